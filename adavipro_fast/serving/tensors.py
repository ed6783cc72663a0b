"""The routes of the Open Inference Protocol (KServe v2).

A model `m` takes pixels and returns the graph's outputs; `m_classify` takes image files and returns
class names and probabilities.
"""

import asyncio
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Request, Response

from adavipro_fast.files.about import Description
from adavipro_fast.serving import kserve
from adavipro_fast.serving.application import VERSION, Application, classified
from adavipro_fast.serving.kserve import TensorSpec
from adavipro_fast.serving.served import CLASSIFY, Generation


def takes(about: Description, files: bool) -> list[TensorSpec]:
    """List a model's inputs."""
    side = about.preprocess.size
    image = TensorSpec("image", "UINT8", (-1, 3, side, side))
    first = TensorSpec("encoded", "BYTES", (-1,)) if files else image
    several = bool(about.tasks) or about.open_for is not None
    return [first, *([TensorSpec("task", "BYTES", (-1,))] if several else [])]


def gives(about: Description, files: bool) -> list[TensorSpec]:
    """List a model's outputs."""
    if files:
        return [TensorSpec("class", "BYTES", (-1,)), TensorSpec("probability", "FP32", (-1,))]
    grid = about.preprocess.size // about.config.region_size
    classes = -1 if about.open_for is not None else about.most_classes
    return [
        TensorSpec("logits", "FP32", (-1, classes)),
        TensorSpec("mask", "INT32", (-1, grid, grid)),
        TensorSpec("embedding", "FP32", (-1, -1)),
    ]


def add_kserve(web: FastAPI, own: Application) -> None:
    """Add the routes of the Open Inference Protocol."""

    @web.get("/v2")
    async def server() -> dict[str, Any]:
        """Describe the server."""
        return {
            "name": "adavipro_fast",
            "version": VERSION,
            "extensions": ["binary_tensor_data"],
        }

    @web.post("/v2/repository/index")
    async def index() -> list[dict[str, str]]:
        """List the models."""
        return [
            {"name": name + kind, "version": str(each.now.version), "state": "READY"}
            for name, each in own.served.items()
            for kind in ("", CLASSIFY)
        ]

    @web.get("/v2/models/{model}/ready")
    @web.get("/v2/models/{model}/versions/{version}/ready")
    async def model_ready(model: str, version: str | None = None) -> dict[str, Any]:
        """Report that a model is ready."""
        own.named(model, version)
        return {"name": model, "ready": True}

    @web.get("/v2/models/{model}")
    @web.get("/v2/models/{model}/versions/{version}")
    async def described(model: str, version: str | None = None) -> dict[str, Any]:
        """Describe a model's tensors."""
        now, files = own.named(model, version)
        tensors = takes(now.about, files), gives(now.about, files)
        return kserve.metadata(model, str(now.version), *tensors)

    @web.post("/v2/models/{model}/infer")
    @web.post("/v2/models/{model}/versions/{version}/infer")
    async def infer(request: Request, model: str, version: str | None = None) -> Response:
        """Run a model on tensors, in JSON or as binary data after it."""
        now, files = own.named(model, version)
        with own.batcher.place(1):
            body = await own.read(request)
            length, inputs = request.headers.get(kserve.HEADER), takes(now.about, files)
            try:
                # Not on the event loop, since parsing a large body takes long.
                asked = await asyncio.to_thread(kserve.parse, body, length, inputs)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
            first = inputs[0].name
            if first not in asked.inputs:
                raise HTTPException(400, f"input {first!r} is missing")
            count = len(asked.inputs[first])
            own.check_images(count)
            with own.batcher.place(count - 1):
                results = await outputs(own, now, asked, files)
            try:
                written = await asyncio.to_thread(
                    kserve.respond, asked, model, str(now.version), results
                )
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
        return Response(*written[:1], headers=written[1])


async def outputs(
    own: Application, now: Generation, asked: kserve.Request, files: bool
) -> dict[str, kserve.Array]:
    """Run a KServe request and return the model's outputs."""
    tasks = None
    if "task" in asked.inputs:
        tasks = [name.decode(errors="replace") for name in asked.inputs["task"]]
    if not files:
        pixels = torch.from_numpy(asked.inputs["image"].copy())
        prediction = await own.run(now, pixels, tasks)
        return {
            "logits": prediction.logits.numpy(),
            "mask": prediction.mask.int().numpy(),
            "embedding": prediction.embedding.numpy(),
        }
    contents = [(str(number), each) for number, each in enumerate(asked.inputs["encoded"])]
    pixels = await own.decoded(contents, now.about)
    results = await classified(own, now, pixels, tasks, None, 1)
    return {
        "class": kserve.strings([each["answer"].encode() for each in results], [len(results)]),
        "probability": np.array(
            [each["classes"][0]["probability"] for each in results], dtype=np.float32
        ),
    }

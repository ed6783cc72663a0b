"""`POST /classify`: image files in, class names and probabilities out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Request

from adavipro_fast.artifact.answers import SHOWN_CLASSES
from adavipro_fast.serving.application import Application, classified
from adavipro_fast.serving.uploads import clean, uploaded

FILES = {
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "image": {"type": "array", "items": {"type": "string", "format": "binary"}}
                },
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "images": {"type": "array", "items": {"type": "string", "format": "byte"}}
                },
            }
        },
    }
}


def add_classify(web: FastAPI, own: Application) -> None:
    """Add the route `/classify`."""

    @web.post("/classify", openapi_extra={"requestBody": FILES})
    async def classify(
        request: Request,
        model: str | None = None,
        task: str | None = None,
        top: int | None = None,
        reject: float | None = None,
    ) -> dict[str, Any]:
        """Classify an image file sent as the body, or several as a form or as base64 in JSON.

        `model`: one of several files; `task`: one of a file's tasks; `top`: how many classes to
        list (5); `reject`: share of known images that may be answered `unknown`. A form or JSON may
        contain the same options. An image that cannot be read gets an `error` instead of an answer.
        """
        asked = {"model": model, "task": task, "top": top, "reject": reject}
        with own.batcher.place(1):
            body = await own.read(request)
            try:
                upload = await uploaded(body, request.headers, own.limits.images)
                options = chosen(asked, upload.options)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
            own.check_images(len(upload.files))
            with own.batcher.place(len(upload.files) - 1):
                return {"predictions": await answered(own, upload.files, options)}


def whole_number(text: str) -> int:
    """Read a number such as 2 or 2.0."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def chosen(asked: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Combine the URL's options with the fields of a form or JSON; the URL takes precedence.

    Raises:
        ValueError: an option is invalid.
    """
    kinds: dict[str, Callable[[str], Any]] = {
        "model": str,
        "task": str,
        "top": whole_number,
        "reject": float,
    }
    options = dict(asked)
    for name, text in fields.items():
        if options[name] is None and text:
            try:
                options[name] = kinds[name](text)
            except ValueError:
                raise ValueError(f"{name} is {text!r}; use a number") from None
    options["top"] = SHOWN_CLASSES if options["top"] is None else options["top"]
    if options["top"] < 1:
        raise ValueError(f"top is {options['top']}; use 1 or more")
    return options


async def answered(
    own: Application, files: Sequence[tuple[str, bytes | ValueError]], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Answer each image file; unreadable files get their error.

    Raises:
        HTTPException: no file can be read, or an option is invalid.
    """
    now, _ = own.named(options["model"] or next(iter(own.served)))
    each = await own.decode_each(files, now.about)
    read = [pixels for pixels in each if not isinstance(pixels, ValueError)]
    if not read:
        raise HTTPException(400, str(each[0]))
    tasks = None if options["task"] is None else [options["task"]] * len(read)
    pixels = torch.from_numpy(np.stack(read))
    try:
        results = iter(await classified(own, now, pixels, tasks, options["reject"], options["top"]))
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    predictions = []
    for (name, _), one in zip(files, each, strict=True):
        failed = isinstance(one, ValueError)
        answer = {"error": clean(str(one))} if failed else next(results)
        predictions.append({"file": name} | answer)
    return predictions

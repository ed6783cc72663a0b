"""The page in the browser, and the two routes that it calls."""

import asyncio
import base64
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from PIL import Image
from torch import Tensor

from adavipro_fast import pictures
from adavipro_fast.artifact.answers import SHOWN_CLASSES, answers, answers_of_tasks
from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.serving.application import Application
from adavipro_fast.serving.served import Generation

PAGE = Path(__file__).with_name("page.html")
# The page may only contact its own server, and may not be embedded in another page.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'"
)
DOTS_PER_INCH = 220


@dataclass(frozen=True)
class Page:
    """Settings of the page."""

    title: str = "adavipro_fast"
    reject: float | None = None
    """share of known images that may be answered `unknown`"""
    beside: Artifact | None = None
    """second artifact to compare with (default: the checkpoint without its prompt)"""
    beside_name: str = "Without the prompt"


def add_page(web: FastAPI, own: Application, page: Page) -> None:
    """Add the page and its routes, which the API documentation leaves out."""
    text = PAGE.read_text()

    @web.get("/", include_in_schema=False)
    async def shown() -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY})

    @web.get("/page.json", include_in_schema=False)
    async def described() -> dict[str, Any]:
        models = [about_model(name, each.now, page) for name, each in own.served.items()]
        return {"title": page.title, "reject": page.reject, "models": models}

    @web.post("/view", include_in_schema=False)
    async def view(
        request: Request,
        name: str = "the picture",
        model: str | None = None,
        task: str | None = None,
        reject: float | None = None,
    ) -> dict[str, Any]:
        now, _ = own.named(model or next(iter(own.served)))
        with own.batcher.place(1):
            seen = await look(own, now, page, (name, await own.read(request)), task, reject)
        own.metrics.pictures += 1
        return seen


def about_model(name: str, now: Generation, page: Page) -> dict[str, Any]:
    """Describe a model for the page."""
    about, beside = now.about, page.beside or now.unprompted
    called = page.beside_name if beside is not None else None
    if beside is not None and not beside.about.calibration.confidences:
        called = f"{called}, not calibrated"
    known = about.tasks or (about,)
    return {
        "name": name,
        "tasks": [task.name for task in about.tasks],
        "prompted": not about.baseline,
        "prompted_picture": now.unprompted is not None,
        "beside": called,
        "calibrated": all(each.calibration.confidences for each in known),
    }


async def look(
    own: Application,
    now: Generation,
    page: Page,
    file: tuple[str, bytes],
    task: str | None,
    reject: float | None,
) -> dict[str, Any]:
    """Classify a picture and draw the images that the page shows.

    Raises:
        HTTPException: the file is not an image, the task is unknown, or `reject` is invalid.
    """
    about, tasks = now.about, None if task is None else [task]
    pixels = await own.decoded([file], about)
    began = time.perf_counter()
    prediction = await own.run(now, pixels, tasks)
    milliseconds = 1e3 * (time.perf_counter() - began)
    try:
        (answer,) = answers_of_tasks(about, prediction, tasks, reject, SHOWN_CLASSES)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    beside, other = page.beside or now.unprompted, None
    if beside is not None:
        alike = beside.about.preprocess == about.preprocess
        again = pixels if alike else await own.decoded([file], beside.about)
        (other,) = answers(beside.about, await asyncio.to_thread(beside, again))
    config = (about if task is None else about.of_task(task)).config
    drawn = await asyncio.to_thread(
        draw, now, pixels, prediction.mask[0], None if about.baseline else config
    )
    runner = f"{now.artifacts[0].backend}, {now.artifacts[0].provider}"
    return answer | drawn | {"beside": other, "milliseconds": milliseconds, "runner": runner}


def draw(
    now: Generation, pixels: Tensor, mask: Tensor, config: PromptConfig | None
) -> dict[str, str | None]:
    """Draw a picture with its mask and, for a checkpoint, the prompted picture.

    Args:
        now: the file that classified it.
        pixels: (1, 3, S, S) uint8.
        mask: (G, G).
        config: the prompt's; None for an encoder without a prompt.
    """
    prompted, content = None, BytesIO()
    figure = pictures.masked(pixels[0], mask, config)
    figure.savefig(content, format="png", dpi=DOTS_PER_INCH)
    seen = None if now.about.baseline else now.artifacts[0].prompted(pixels)
    if seen is not None:
        written = BytesIO()
        Image.fromarray(seen[0].permute(1, 2, 0).numpy()).save(written, "png")
        prompted = inline(written)
    return {"picture": inline(content), "prompted": prompted}


def inline(content: BytesIO) -> str:
    """Return a PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def warm(served: Generation, page: Page) -> None:
    """Make the slow first call, and check that `reject` can be used.

    Raises:
        ValueError: the file contains no calibration, which `reject` needs.
    """
    about = served.about
    side = about.preprocess.size
    blank = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    named: list[list[str] | None] = [[task.name] for task in about.tasks]
    for tasks in named or [None]:
        prediction = served.artifacts[0](blank, tasks)
        answers_of_tasks(about, prediction, tasks, page.reject)
    beside = page.beside or served.unprompted
    if beside is not None:
        side = beside.about.preprocess.size
        beside(torch.zeros(1, 3, side, side, dtype=torch.uint8))

"""The page of `python -m adavipro_fast.app`, in Gradio: a place to drop pictures, and panels."""

import html
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from adavipro_fast.artifact.answers import SHOWN_CLASSES, UNKNOWN
from adavipro_fast.errors import printable
from adavipro_fast.serving.viewer import Viewer

LARGEST_FILE = "64mb"
DROP_HEIGHT, PICTURE_HEIGHT = 200, 380
# Names of fonts that systems have: none is fetched.
FONTS = ("system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif")
FONTS_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
HINT = "Blue outline: the prompt is added there. Grey and hatched: it is left out."
NO_TEMPLATE = "An exported file gives no prompted image; open its checkpoint to see it."
# A dropped file's bytes and name.
Dropped = tuple[bytes, str]


class Page:
    """The page, and how many pictures it showed.

    Args:
        viewer: looks at them.
        title: of the page.
        beside: what to call the artifact beside.
    """

    def __init__(self, viewer: Viewer, *, title: str, beside: str) -> None:
        self.viewer, self.shown = viewer, 0
        self.prompted = not viewer.artifact.about.baseline
        if viewer.beside is not None and not viewer.beside.about.calibration.confidences:
            beside += ", not calibrated"
        with gr.Blocks(title=title, analytics_enabled=False) as self.blocks:
            self._lay_out(title, beside)

    def _lay_out(self, title: str, beside: str) -> None:
        viewer, tasks = self.viewer, self.viewer.tasks
        kept = gr.State()
        gr.Markdown(f"### {html.escape(title)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                drop = gr.File(label="Drop a picture here", height=DROP_HEIGHT)
                task = gr.Dropdown(
                    tasks, value=next(iter(tasks), None), label="Task", visible=bool(tasks)
                )
                status = gr.Markdown()
            label = gr.Label(
                label="With the prompt" if self.prompted and not tasks else "Classes",
                num_top_classes=SHOWN_CLASSES,
                scale=3,
            )
            other = gr.Label(
                label=beside,
                num_top_classes=SHOWN_CLASSES,
                visible=viewer.beside is not None,
                scale=3,
            )
        with gr.Row():
            mask = panel("Where the prompt is added" if self.prompted else "The picture")
            prompted = panel("The prompted picture", visible=viewer.holds_template)
        if self.prompted:
            gr.Markdown(HINT if viewer.holds_template else f"{HINT} {NO_TEMPLATE}")
        panels = [label, other, mask, prompted, status]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        drop.upload(self.drop, [drop, task], [kept, *panels], **private)
        # Empty at once, for the next one; `then` does not follow an error.
        drop.upload(lambda: None, None, drop, **private)
        task.change(self.show, [kept, task], panels, **private)

    def drop(self, path: str, task: str | None) -> list[Any]:
        """Show a file that was dropped, and keep it for other tasks."""
        kept = (Path(path).read_bytes(), Path(path).name)
        panels = self.show(kept, task)
        self.shown += 1
        return [kept, *panels]

    def show(self, kept: Dropped | None, task: str | None) -> list[Any]:
        """Return what the panels show.

        Raises:
            gr.Error: the picture cannot be read, told in one line.
        """
        if kept is None:
            return [None] * 5
        try:
            view = self.viewer.view(*kept, task or None)
        except (ValueError, OSError, MemoryError) as error:
            message = html.escape(printable(" ".join(str(error).split())))
            raise gr.Error(message, print_exception=False) from error
        runner = self.viewer.artifact
        status = f"{view.latency_ms:.1f} ms ({runner.backend}, {runner.provider})"
        rejected = view.answer["rejected"]
        return [
            probabilities(view.answer),
            view.beside and probabilities(view.beside),
            view.mask,
            view.prompted,
            f"**{UNKNOWN}**: too unsure to be answered. {status}" if rejected else status,
        ]

    def application(self, host: str) -> FastAPI:
        """Return the web application; names of other hosts are refused, as of rebound ones."""
        application = FastAPI(openapi_url=None)
        local = ["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host]
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=local)
        mounted: FastAPI = gr.mount_gradio_app(
            application,
            self.blocks,
            path="",
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=LARGEST_FILE,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=FONTS_MONO),
        )
        # Without it Gradio takes any path of this machine for a file that was dropped.
        self.blocks.has_launched = True
        return mounted


def panel(label: str, visible: bool = True) -> gr.Image:
    """Make a place for a picture, its name above it: nothing lies on the frame's corners."""
    with gr.Column(visible=visible):
        gr.Markdown(label)
        return gr.Image(
            show_label=False,
            alt_text=label,
            format="png",
            height=PICTURE_HEIGHT,
            interactive=False,
            buttons=[],
        )


def probabilities(answer: dict[str, Any]) -> dict[str, float]:
    """Turn an answer into what a label shows."""
    return {row["name"]: row["probability"] for row in answer["classes"]}

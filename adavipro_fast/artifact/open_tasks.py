"""A file whose tasks are data: added to and removed from a running process.

A call stacks the tables of the tasks that its own images name, so that a task costs memory once and
a graph nothing. The set of tasks is replaced, never changed: calls that run go on with the set that
they began with.
"""

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adavipro_fast.artifact.artifact import Artifact, GraphArtifact
from adavipro_fast.files.about import Task, Tasks
from adavipro_fast.files.task import TaskFile, load_task, stacked
from adavipro_fast.method.config import DTYPES
from adavipro_fast.method.model import Prediction


class OpenArtifact(Artifact):
    """An exported graph whose tables are inputs, and the tasks that it answers for now.

    Args:
        file: exported with `--tasks open`.
    """

    def __init__(self, file: GraphArtifact) -> None:
        self.file, self.inputs = file, file.inputs
        self.backend, self.provider = file.backend, file.provider
        self._lock = threading.Lock()
        self._keep({})

    def add(self, task: str | Path | TaskFile) -> str:
        """Add a task and return its name; calls that run are not disturbed.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, of another encoder, preprocessing, region size or edges, or its
                name is taken.
        """
        loaded = task if isinstance(task, TaskFile) else load_task(Path(task))
        self._check(loaded)
        # Once on the device, not at every call.
        tables = {name: table.to(self.file.device) for name, table in loaded.tables.items()}
        with self._lock:
            tasks, _ = self._now
            if loaded.name in tasks:
                raise ValueError(f"task {loaded.name!r} already exists; remove it first")
            self._keep({**tasks, loaded.name: replace(loaded, tables=tables)})
        return loaded.name

    def remove(self, name: str) -> None:
        """Remove a task; from the next call on its name is unknown.

        Raises:
            ValueError: no such task.
        """
        with self._lock:
            tasks, about = self._now
            about.numbers(name, 1)
            self._keep({other: task for other, task in tasks.items() if other != name})

    def __call__(self, pixels: Tensor, task: Tasks | None = None) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels; logits are as wide as the widest task named."""
        about = self.about
        return about.prediction(self.run(about.image(pixels.to(self.file.device)), task))

    def run(self, image: Tensor, tasks: Tasks | None = None) -> dict[str, Tensor]:
        """Run the graph on its input, on the file's device, for tasks that are known by now."""
        known, about = self._now
        if not known:
            raise ValueError(
                "the file holds no task yet; create one with adavipro-to-task and add it"
            )
        names = [about.tasks[number].name for number in about.numbers(tasks, len(image))]
        present = list(dict.fromkeys(names))
        device = self.file.device
        feeds = {
            "image": image,
            "task": torch.tensor([present.index(name) for name in names], device=device),
            # Of older files.
            "numbers": torch.arange(len(present), device=device),
            **stacked([known[name] for name in present], DTYPES[about.precision]),
        }
        # A graph without a mask path takes no kernels.
        return self.file.run_on({name: feeds[name] for name in feeds.keys() & self.inputs})

    def _keep(self, known: Mapping[str, TaskFile]) -> None:
        """Replace tasks and description together: a call reads both at once."""
        tasks = (
            Task(t.name, t.class_names, t.config, t.calibration, bytes=t.bytes)
            for t in known.values()
        )
        self.about = replace(self.file.about, tasks=tuple(tasks))
        self._now = known, self.about

    def _check(self, task: TaskFile) -> None:
        """Raise ValueError unless a task's tables fit the graph."""
        about = self.file.about
        graph = about.open_for
        assert graph is not None
        if task.encoder.sha256 != graph.encoder_sha256:
            raise ValueError(
                f"task {task.name!r} was trained on another encoder, {task.encoder.name!r} "
                f"({task.encoder.sha256[:12]}); the file contains {graph.encoder_sha256[:12]}"
            )
        # How JPEGs are decoded is the file's to say.
        if replace(task.preprocess, decode=about.preprocess.decode) != about.preprocess:
            raise ValueError(f"task {task.name!r} preprocesses images differently from the file")
        if task.config.region_size != about.config.region_size:
            raise ValueError(
                f"task {task.name!r} has regions of {task.config.region_size} pixels; the file "
                f"needs {about.config.region_size}"
            )
        edges = (task.config.edge, task.config.edge_padding)
        if task.config.method == "adavipro" and edges != (graph.edge, graph.edge_padding):
            raise ValueError(
                f"task {task.name!r} uses edges {' '.join(edges)}; the file computes "
                + (f"{graph.edge} {graph.edge_padding}" if graph.edge else "none")
            )
        shapes = self.inputs
        for name, table in task.tables.items():
            # A graph without a mask path takes no kernels.
            sizes = [
                size for size in shapes.get(name, ())[1:] if isinstance(size, int) and size > 0
            ]
            if sizes and sizes != list(table.shape)[-len(sizes) :]:
                raise ValueError(f"table {name!r} of task {task.name!r} does not fit the graph")

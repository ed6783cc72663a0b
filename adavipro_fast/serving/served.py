"""A file that is served: opened on each device, and opened again when it changes."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.artifact.open_tasks import OpenArtifact
from adavipro_fast.artifact.torch import TorchArtifact
from adavipro_fast.files.about import Description

Stamp = tuple[int, int] | None
# Behind a file's name: the model that takes image files.
CLASSIFY = "_classify"
# What lies beside a file and belongs to it: weights of a large graph, an engine's description.
BESIDE = ("", ".data", ".json")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Generation:
    """A file as it was opened: one artifact a device, and which opening of the server's life."""

    artifacts: tuple[Artifact, ...]
    version: int

    @property
    def about(self) -> Description:
        """What the file says about itself."""
        return self.artifacts[0].about

    @cached_property
    def unprompted(self) -> TorchArtifact | None:
        """A checkpoint's encoder and head alone; none of other files, and without a prompt."""
        first = self.artifacts[0]
        prompted = isinstance(first, TorchArtifact) and not first.about.baseline
        return first.unprompted() if prompted and isinstance(first, TorchArtifact) else None


class Served:
    """A file under a name; requests go on with the generation that they began with.

    Args:
        name: in addresses.
        path: of the artifact.
        devices: where it runs.
        tasks: folder of .task files, of a file whose tasks are data.
        options: of `open_artifact`.
        say: called with a line for each file that was reloaded or could not be.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        devices: Sequence[str] = ("auto",),
        *,
        tasks: Path | None = None,
        say: Say = lambda _: None,
        **options: Any,
    ) -> None:
        self.name, self.path, self.devices, self.tasks, self.say = name, path, devices, tasks, say
        self._options = options
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[Stamp, str]] = {}
        """task files: what they were when they were added, and the task's name"""
        self._stamp = self._stamps()
        self.now = self._opened(1)
        self._take_tasks()

    @property
    def open(self) -> bool:
        """Whether its tasks are data."""
        return isinstance(self.now.artifacts[0], OpenArtifact)

    def refresh(self) -> None:
        """Open the file again where it has changed, and take up tasks that came or went.

        If it cannot be opened, the error is reported and the old generation stays in service.
        """
        with self._lock:
            now = self._stamps()
            if now[0] is not None and now != self._stamp:
                self._stamp = now
                try:
                    following = self._opened(self.now.version + 1)
                # Whatever it is, memory that ran out too: the server goes on.
                except Exception as error:
                    self.say(
                        f"{self.name}: cannot load the new file, the old one stays in "
                        f"service: {error}"
                    )
                else:
                    self._known = {}
                    self._take_tasks(following)
                    self.now = following
                    self.say(f"{self.name}: loaded the new file as version {following.version}")
            self._take_tasks()

    def _stamps(self) -> tuple[Stamp, ...]:
        return tuple(stamp(self.path.with_name(self.path.name + end)) for end in BESIDE)

    def _opened(self, version: int) -> Generation:
        artifacts = [
            open_artifact(self.path, device=device, **self._options) for device in self.devices
        ]
        return Generation(tuple(artifacts), version)

    def _take_tasks(self, generation: Generation | None = None) -> None:
        """Make the tasks of a generation those of the folder."""
        artifacts = (generation or self.now).artifacts
        if self.tasks is None or not isinstance(artifacts[0], OpenArtifact):
            return
        found = {path: stamp(path) for path in sorted(self.tasks.glob("*.task"))}
        for path, (known, name) in list(self._known.items()):
            if found.get(path) != known:
                del self._known[path]
                for artifact in artifacts:
                    # One that could not be added is none.
                    if name and isinstance(artifact, OpenArtifact):
                        artifact.remove(name)
                self.say(f"{self.name}: removed task {name or path.stem!r}")
                # One of the same name may have waited.
                self._known = {p: entry for p, entry in self._known.items() if entry[1]}
        for path, now in found.items():
            if path not in self._known:
                self._known[path] = now, self._add(path, artifacts)

    def _add(self, path: Path, artifacts: Sequence[Artifact]) -> str:
        added, name = [], ""
        try:
            for artifact in artifacts:
                assert isinstance(artifact, OpenArtifact)
                name = artifact.add(path)
                added.append(artifact)
        except Exception as error:
            for artifact in added:
                artifact.remove(name)
            self.say(f"{self.name}: cannot add {path.name}: {error}")
            return ""
        self.say(f"{self.name}: added task {name!r}")
        return name


def stamp(path: Path) -> Stamp:
    """Tell one state of a file from another; none where it is absent."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size

"""A served file: opened on each device, and reloaded when it changes."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.artifact.open_tasks import OpenArtifact
from adavipro_fast.files.about import Description

Stamp = tuple[int, int] | None
# Suffix of the model name that accepts image files instead of pixels.
CLASSIFY = "_classify"
# Suffixes of a file and its companions: the weights of a large graph, an engine's sidecar.
BESIDE = ("", ".data", ".json")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Generation:
    """One opening of a file: an artifact per device, and a version that counts the openings."""

    artifacts: tuple[Artifact, ...]
    version: int

    @property
    def about(self) -> Description:
        """The file's description."""
        return self.artifacts[0].about

    @cached_property
    def unprompted(self) -> Artifact | None:
        """The model without its prompt; None for exported files and files without a prompt."""
        first = self.artifacts[0]
        return None if first.about.baseline else first.unprompted()


class Served:
    """A named file; a request finishes with the generation that it began with.

    Args:
        name: the model's name in URLs.
        path: the artifact's path.
        devices: devices to run on.
        tasks: folder of .task files, for a file exported with --tasks open.
        options: of `open_artifact`.
        say: called with a line for each file or task that changed or failed to load.
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
        """for each task file, its stamp when added, and the task's name (empty if that failed)"""
        self._stamp = self._stamps()
        self.now = self._opened(1)
        self._take_tasks()

    @property
    def tasks_are_inputs(self) -> bool:
        """Whether the file was exported with --tasks open."""
        return isinstance(self.now.artifacts[0], OpenArtifact)

    def refresh(self) -> None:
        """Reload the file if it has changed, and update the tasks from the folder.

        If it cannot be opened, the error is reported and the old generation stays in service.
        """
        with self._lock:
            now = self._stamps()
            if now[0] is not None and now != self._stamp:
                self._stamp = now
                try:
                    following = self._opened(self.now.version + 1)
                # The server continues after any error, even out of memory.
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
        """Add and remove tasks of a generation to match the folder."""
        artifacts = (generation or self.now).artifacts
        if self.tasks is None or not isinstance(artifacts[0], OpenArtifact):
            return
        stamps = {path: stamp(path) for path in sorted(self.tasks.glob("*.task"))}
        for path, (known, name) in list(self._known.items()):
            if stamps.get(path) != known:
                del self._known[path]
                for artifact in artifacts:
                    # The name is empty if the file could not be added.
                    if name and isinstance(artifact, OpenArtifact):
                        artifact.remove(name)
                self.say(f"{self.name}: removed task {name or path.stem!r}")
                # Try failed files again: one may have the name that is now free.
                self._known = {p: entry for p, entry in self._known.items() if entry[1]}
        for path, now in stamps.items():
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
    """Return a file's modification time and size; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size

"""A labelled folder: train/ [val/] test/<class name>/*."""

from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from adavipro_fast.data.source import Source, file_source


def folder_sources(root: Path) -> tuple[tuple[str, ...], dict[str, Source]]:
    """Read class names and splits of a folder.

    Raises:
        FileNotFoundError: train/ or test/ is missing.
        ValueError: a class is empty, or splits disagree on the classes.
    """
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise FileNotFoundError(f"{root} has no folder {split}/; its classes belong there")
    names = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    classes = {name: _class_folders(root / name) for name in names}
    for split, found in classes.items():
        odd = sorted(set(found) ^ set(classes["train"]))
        if odd:
            raise ValueError(
                f"class {odd[0]!r} is in only one of {root / 'train'} and {root / split}; "
                "every split needs the same classes"
            )
    class_names = tuple(classes["train"])
    return class_names, {name: _folder_source(root / name, class_names) for name in names}


def _class_folders(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in names:
        # The file system's bytes are no text: they could not be stored or shown.
        if not name.isprintable() and not _is_text(name):
            raise ValueError(f"class folder {name!r} in {folder} is not UTF-8; rename it")
    if not names:
        raise ValueError(f"{folder} has no class folders; put images in {folder}/<class name>/")
    return names


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _folder_source(folder: Path, class_names: tuple[str, ...]) -> Source:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = sorted(
            path
            for path in (folder / name).rglob("*")
            if path.suffix.lower() in IMG_EXTENSIONS and path.is_file()
        )
        if not found:
            raise ValueError(f"{folder / name} holds no image; remove the class or add images")
        files += found
        labels += [label] * len(found)
    return file_source(files, labels)

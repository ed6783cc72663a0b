"""A labelled folder: train/ [val/] [test/] with class folders inside, or class folders alone."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from adavipro_fast.data.source import Source, Sources, file_source
from adavipro_fast.data.walk import Found, subfolders, walk

# What people call the splits; upper and lower case are the same.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# Classes with fewer training images are named in a warning.
FEW = 10
NAMED = 5


def folder_sources(root: Path, *, skip_unreadable: bool = False) -> Sources:
    """Read class names and splits of a folder; class folders alone are training images.

    Args:
        root: of the splits, or of the classes.
        skip_unreadable: take classes most of whose files are no images.

    Raises:
        FileNotFoundError: there is no train/ beside the other splits.
        ValueError: a class is empty, has mostly other files, or is missing in train/.
    """
    folders, notes = split_folders(root)
    if not folders:
        folders = {"train": root}
        notes.append(f"{root} has no train/; its folders are the classes, and all are for training")
    elif "train" not in folders:
        raise FileNotFoundError(
            f"{root} has {', '.join(folders)} and no folder train/; training images belong there"
        )
    classes = {split: class_folders(folder) for split, folder in folders.items()}
    class_names = tuple(classes["train"])
    if not class_names:
        raise ValueError(
            f"{folders['train']} has no class folders; put images in "
            f"{folders['train']}/<class name>/"
        )
    splits = {}
    for split, found in classes.items():
        unknown = [name for name in found if name not in classes["train"]]
        if unknown:
            raise ValueError(
                f"class {unknown[0]!r} is in {folders[split]} and not in {folders['train']}; every "
                "class needs training images"
            )
        splits[split], missing = _source(
            folders[split], found, class_names, skip_unreadable=skip_unreadable
        )
        if missing and split == "train":
            raise ValueError(f"{found[missing[0]]} holds no image; remove the class or add images")
        if missing:
            notes.append(f"{folders[split]} has no image of {listed(missing)}")
    counts = Counter(class_names[label] for label in splits["train"].labels)
    few = [f"{name} ({counts[name]})" for name in class_names if counts[name] < FEW]
    if few and max(counts.values()) >= FEW:
        notes.append(f"few training images of {listed(few)}")
    return Sources(class_names, splits, tuple(notes))


def source_of_test(
    root: Path, known: Sequence[str], *, skip_unreadable: bool = False
) -> tuple[Source, list[str]]:
    """Read a test split alone, labels by class names: the images, and notes about them.

    Args:
        root: holds test/; or the class folders themselves.
        known: class names in label order.
        skip_unreadable: as for `folder_sources`.

    Raises:
        FileNotFoundError: there are other splits and no test/.
        ValueError: a class is unknown, or there is no image.
    """
    folders, notes = split_folders(root)
    if folders and "test" not in folders:
        raise FileNotFoundError(
            f"{root} has no folder test/; name a folder with test/, or one that holds class folders"
        )
    folder = folders.get("test", root)
    found = class_folders(folder)
    names = {composed(name): label for label, name in enumerate(known)}
    unknown = [name for name in found if name not in names]
    if unknown:
        raise ValueError(
            f"{folder} has classes that the model does not know: {listed(unknown)}; it knows "
            f"{listed(known)}"
        )
    source, missing = _source(
        folder, found, tuple(composed(name) for name in known), skip_unreadable=skip_unreadable
    )
    if not source.labels:
        raise ValueError(f"{folder} holds no image of {listed(known)}")
    if missing:
        notes.append(f"{folder} has no image of {listed(missing)}")
    return source, notes


def split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Find the splits' folders, and note folders beside them that are not used.

    Raises:
        ValueError: two folders are of one split.
    """
    found: dict[str, Path] = {}
    others = []
    for folder in subfolders(root):
        split = next((s for s, names in SPLITS.items() if folder.name.lower() in names), None)
        if split is None:
            others.append(folder.name)
        elif split in found:
            raise ValueError(f"{root} has both {found[split].name}/ and {folder.name}/; keep one")
        else:
            found[split] = folder
    # A class may be called `train`, beside other classes.
    if others and not any(subfolders(folder) for folder in found.values()):
        return {}, []
    if found and others:
        names = ", ".join(f"{name}/" for name in others[:NAMED])
        return found, [f"{root} holds {names} beside the splits; it is not used"]
    return found, []


def class_folders(folder: Path) -> dict[str, Path]:
    """Find the class folders of a split, by their names in Unicode's composed form.

    Raises:
        ValueError: a name is not text, or two are the same text.
    """
    found: dict[str, Path] = {}
    for path in subfolders(folder):
        # The file system's bytes are no text: they could not be stored or shown.
        if not path.name.isprintable() and not _is_text(path.name):
            raise ValueError(f"class folder {path.name!r} in {folder} is not UTF-8; rename it")
        name = composed(path.name)
        if name in found:
            raise ValueError(f"{folder} has two folders that are called {name!r}; merge them")
        found[name] = path
    return dict(sorted(found.items()))


def composed(name: str) -> str:
    """Return a name in Unicode's composed form (NFC); macOS gives the decomposed one."""
    return unicodedata.normalize("NFC", name)


def listed(names: Sequence[str]) -> str:
    """List names, the first ones of many."""
    shown = ", ".join(repr(name) if " (" not in name else name for name in names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _source(
    folder: Path, found: dict[str, Path], class_names: tuple[str, ...], *, skip_unreadable: bool
) -> tuple[Source, list[str]]:
    """Collect a split's images, and name the classes that have none."""
    files: list[Path] = []
    labels: list[int] = []
    missing = []
    left_out: Counter[str] = Counter()
    for label, name in enumerate(class_names):
        inside = walk(found[name]) if name in found else Found()
        others = inside.left_out.total()
        if others > len(inside.images) > 0 and not skip_unreadable:
            kinds = ", ".join(f"{count} {kind}" for kind, count in inside.left_out.most_common())
            raise ValueError(
                f"{others} of {others + len(inside.images)} files of class {name!r} in {folder} "
                f"are not images: {kinds}; move them away, or leave them out with "
                "--skip-unreadable"
            )
        if not inside.images:
            missing.append(name)
        files += inside.images
        labels += [label] * len(inside.images)
        left_out += inside.left_out
    return file_source(files, labels, left_out), missing

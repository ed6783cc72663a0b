"""A labelled folder: train/ [val/] [test/] with class folders inside, or only class folders."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from adavipro_fast.data.source import Source, Sources, file_source
from adavipro_fast.data.walk import (
    Found,
    identity_of,
    is_sidecar,
    kind_of,
    not_entered,
    subfolders,
    walk,
)

# Accepted names of the splits, in any case.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
NAMED = 5
# Names that suggest a split, such as `train_set`.
LIKE_A_SPLIT = re.compile(r"(^|[^a-z])(train|training|test|testing|valid|validation)([^a-z]|$)")


def folder_sources(root: Path, *, skip_unreadable: bool = False) -> Sources:
    """Read class names and splits of a folder; without split folders, all is training data.

    Args:
        root: parent folder of the splits or of the classes.
        skip_unreadable: accept classes in which most files are not images, and skip folders
            without read permission.

    Raises:
        ValueError: a class is empty, has mostly other files, or is missing from train/.
    """
    folders, notes = split_folders(root)
    others = set(folders.values())
    if "train" not in folders:
        what = "class folders" if folders else "folders"
        notes.append(f"{root} has no train/; its {what} hold the training images, one class each")
        folders = {"train": root} | folders
    classes = {
        split: class_folders(folder, root, others if folder == root else set(), notes)
        for split, folder in folders.items()
    }
    class_names = tuple(classes["train"])
    if not class_names:
        raise ValueError(
            f"{folders['train']} has no class folders; put images in "
            f"{folders['train']}/<class name>/"
        )
    if folders["train"] == root:
        check_flat(root, list(classes["train"].values()))
    splits = {}
    for split, found in classes.items():
        inside = {
            name: walk(folder, outer_of(root, folders[split])) for name, folder in found.items()
        }
        known = {name: each for name, each in inside.items() if name in classes["train"]}
        unknown = [name for name in inside if name not in known and not inside[name].empty]
        if unknown:
            raise ValueError(
                f"class {unknown[0]!r} is in {folders[split]} but not in {folders['train']}; every "
                "class needs training images"
            )
        source, missing = _source(folders[split], known, class_names, notes, skip=skip_unreadable)
        if missing and split == "train":
            raise ValueError(
                f"{found[missing[0]]} contains no images; add some or remove the class"
            )
        if not source.labels:
            notes.append(f"{folders[split]} contains no images; it is ignored")
            continue
        splits[split] = source
        if missing:
            notes.append(f"{folders[split]} has no images of {listed(missing)}")
    if len(class_names) == 1:
        notes.append(
            f"{class_names[0]!r} is the only class, so every image will be classified as it"
        )
    return Sources(class_names, splits, tuple(notes))


def check_flat(root: Path, classes: Sequence[Path]) -> None:
    """Raise ValueError if a supposed class folder looks like a split or contains splits."""
    for folder in classes:
        inner, _ = split_folders(folder)
        if inner and any(subfolders(path) for path in inner.values()):
            names = ", ".join(f"{path.name}/" for path in inner.values())
            raise ValueError(
                f"{root} contains {folder.name}/, which contains {names}; use {folder} instead"
            )
        if LIKE_A_SPLIT.search(folder.name.lower()) and subfolders(folder):
            raise ValueError(
                f"{folder} looks like a split, not like a class; name the splits train/, val/ and "
                "test/"
            )


def source_of_test(
    root: Path, known: Sequence[str], *, skip_unreadable: bool = False
) -> tuple[Source, list[str]]:
    """Read only a test split, labelled by class name; return the images and notes about them.

    Args:
        root: a folder that contains test/ or the class folders.
        known: class names in label order.
        skip_unreadable: as for `folder_sources`.

    Raises:
        FileNotFoundError: there are other splits but no test/.
        ValueError: a class is unknown, or there are no images.
    """
    folders, notes = split_folders(root)
    if folders and "test" not in folders:
        raise FileNotFoundError(
            f"{root} has no test/; use a folder with test/ or with class folders"
        )
    folder = folders.get("test", root)
    found = class_folders(folder, root, set(), notes)
    if not found:
        raise ValueError(
            f"{folder} has no class folders; use the folder that contains them, such as {folder}/.."
        )
    inside = {name: walk(path, outer_of(root, folder)) for name, path in found.items()}
    names = tuple(composed(name) for name in known)
    unknown = [name for name in inside if name not in names and not inside[name].empty]
    if unknown:
        raise ValueError(
            f"{folder} has classes that the model does not have: {listed(unknown)}; its classes "
            f"are {listed(known)}"
        )
    source, missing = _source(folder, inside, names, notes, skip=skip_unreadable)
    if not source.labels:
        raise ValueError(f"{folder} contains no images of {listed(known)}")
    if missing:
        notes.append(f"{folder} has no image of {listed(missing)}")
    if source.left_out:
        notes.append(left_out_note(source.left_out))
    return source, notes


def outer_of(root: Path, split: Path) -> list[Path]:
    """Return the folders that a link in a class folder must not lead back to."""
    return [split, root, *root.absolute().parents]


def left_out_note(left_out: Mapping[str, int]) -> str:
    """Report which kinds of files were left out."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(left_out).most_common())
    return f"skipped files that are not images: {kinds}"


def split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the splits' folders, and notes about unused folders beside them.

    Raises:
        ValueError: two folders belong to the same split.
    """
    found: dict[str, Path] = {}
    others = []
    for folder in subfolders(root):
        split = next((s for s, names in SPLITS.items() if folder.name.lower() in names), None)
        if split is None:
            others.append(folder.name)
        elif split in found:
            raise ValueError(
                f"{root} has both {found[split].name}/ and {folder.name}/; remove one of them"
            )
        else:
            found[split] = folder
    # Folders without subfolders are classes, and one of them may be called `train`.
    if others and not any(subfolders(folder) for folder in found.values()):
        return {}, []
    if "train" in found and others:
        names = ", ".join(f"{name}/" for name in others[:NAMED])
        return found, [f"{root} contains {names} beside the splits; it is ignored"]
    return found, []


def class_folders(
    folder: Path, root: Path, others: Collection[Path], notes: list[str]
) -> dict[str, Path]:
    """Return the class folders of a split by name, in Unicode's composed form.

    Args:
        folder: the split's folder.
        root: the data set's folder.
        others: folders that are not classes.
        notes: extended with messages about the folder's other content.

    Raises:
        ValueError: a name is not valid text, or two names are equal after composition.
    """
    found: dict[str, Path] = {}
    outer = {identity_of(root), identity_of(folder)}
    for path in subfolders(folder):
        if path in others:
            continue
        if identity_of(path) in outer:
            notes.append(f"{path} is a link back to {path.resolve()}; it is skipped")
            continue
        # Names that are not valid UTF-8 could be neither stored nor shown.
        if not path.name.isprintable() and not _is_text(path.name):
            raise ValueError(
                f"class folder {os.fsencode(path.name)!r} in {folder} is not UTF-8; rename it"
            )
        name = composed(path.name)
        if name in found:
            raise ValueError(f"{folder} has two folders named {name!r}; merge them")
        found[name] = path
    if left := not_entered(folder):
        notes.append(f"{folder} contains {listed(left)}, which is skipped")
    if loose := sum(kind_of(p) == "image" for p in folder.iterdir() if is_loose(p)):
        notes.append(f"{loose} images in {folder} are not in a class folder; they are skipped")
    return dict(sorted(found.items()))


def is_loose(path: Path) -> bool:
    """Report whether a path is a file outside the class folders that is not a sidecar."""
    return not is_sidecar(path.name) and not path.is_dir()


def composed(name: str) -> str:
    """Return a name in Unicode's composed form (NFC); macOS may return decomposed names."""
    return unicodedata.normalize("NFC", name)


def listed(names: Sequence[str]) -> str:
    """Join names for a message, shortened to the first `NAMED`."""
    shown = ", ".join(repr(name) if " (" not in name else name for name in names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _source(
    folder: Path,
    found: Mapping[str, Found],
    class_names: tuple[str, ...],
    notes: list[str],
    *,
    skip: bool,
) -> tuple[Source, list[str]]:
    """Collect a split's images; also return the classes without images."""
    files: list[Path] = []
    labels: list[int] = []
    missing = []
    left_out: Counter[str] = Counter()
    for label, name in enumerate(class_names):
        inside = found.get(name, Found())
        others = inside.left_out.total()
        if inside.denied:
            line = f"no permission to read the folder {inside.denied[0]}"
            if not skip:
                raise ValueError(
                    f"{line}; change its permissions, or skip it with --skip-unreadable"
                )
            notes.append(f"{line}; it is skipped")
        if others > len(inside.images) and not skip:
            kinds = ", ".join(f"{count} {kind}" for kind, count in inside.left_out.most_common())
            raise ValueError(
                f"{others} of {others + len(inside.images)} files of class {name!r} in {folder} "
                f"are not images: {kinds}; move them away, or skip them with --skip-unreadable"
            )
        if not inside.images:
            missing.append(name)
        files += inside.images
        labels += [label] * len(inside.images)
        left_out += inside.left_out
    return file_source(files, labels, left_out), missing

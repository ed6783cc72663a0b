"""data.json of a run: its numbers of images, held-out images and files left out."""

import json
from pathlib import Path

from adavipro_fast.data.folder import split_folders
from adavipro_fast.data.sets import Dataset
from adavipro_fast.files.whole import write_whole

NAME = "data.json"


def keep_data(dataset: Dataset, data: str, folder: Path) -> None:
    """Write data.json: numbers of images, held-out images and files left out."""
    facts = dataset.facts
    content = {
        "data": data,
        "class_names": dataset.class_names,
        "images": dataset.counts,
        "left_out": dict(facts.left_out),
        "unreadable": facts.unreadable,
        "held_out": facts.held_out,
        "duplicates": facts.duplicates.stored(),
        "notes": facts.notes,
    }
    write_whole(folder / NAME, (json.dumps(content, indent=1) + "\n").encode())


def trained_on(checkpoint: Path, data: Path) -> bool:
    """Report whether a checkpoint was trained on this folder, which has no separate test split."""
    try:
        own = Path(json.loads(checkpoint.with_name(NAME).read_text())["data"])
        same = own.is_dir() and data.is_dir() and own.samefile(data)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return same and not split_folders(data)[0]

"""data.json of a run: which images it validates with and leaves out, and how many it has."""

import json
from pathlib import Path

from adavipro_fast.data.sets import Dataset
from adavipro_fast.files.whole import write_whole


def keep_data(dataset: Dataset, data: str, folder: Path) -> None:
    """Write data.json: which images the run validates with and leaves out, and how many it has."""
    facts = dataset.facts
    content = {
        "data": data,
        "class_names": dataset.class_names,
        "images": dataset.counts,
        "left_out": dict(facts.left_out),
        "unreadable": facts.unreadable,
        "held_out": facts.held_out,
        "duplicates": {
            "between_splits": facts.duplicates.between_splits,
            "between_classes": facts.duplicates.between_classes,
        },
        "notes": facts.notes,
    }
    write_whole(folder / "data.json", (json.dumps(content, indent=1) + "\n").encode())

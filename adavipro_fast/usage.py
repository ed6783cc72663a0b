"""How a command explains itself: its name, its flags in groups, and usage errors in a sentence."""

import re
import sys
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName)
# Title of the flags that a command's configuration holds itself and does not show first.
FURTHER = "further"
# How tyro's usage errors become one sentence.
REWRITTEN = (
    ("[\u2500-\u257f•]|---+", " "),
    (r"\s+", " "),
    ("(For full|Argument) helptext.*|Expected 1 values.*", ""),
    # Configuration classes are not names that the user has typed.
    (r"^ Error parsing ([^-]\S*: )?", ""),
    ("^ Missing from .*?: ", "missing: "),
    ("^ Missing", "missing"),
    ("^ Unrecognized", "unrecognized"),
    (" Perhaps you meant: ", "; perhaps you meant "),
    (r" \(required\)", ";"),
    (r" \(default: (None|'')\)|{None}\|", ""),
    ("^ |[ .;]+$", ""),
)


def program() -> str:
    """Return how the user started this program."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None and module.origin == sys.argv[0]:
        return f"python -m {module.name}"
    path = Path(sys.argv[0])
    return f"python {path}" if path.suffix == ".py" else path.name


def sentence(box: str) -> str:
    """Reduce tyro's box to one sentence, without its title, which says the same."""
    text = box.partition("\n")[2] or box
    for pattern, replacement in REWRITTEN:
        text = re.sub(pattern, replacement, text)
    return text


def print_help(kind: type[Any], default: Any) -> NoReturn:
    """Print the flags in groups: those that `kind.help_first` names, then the rest."""
    groups: dict[str, list[StructFieldSpec]] = {}
    _collect(kind, default, groups)
    flags = {flag.name: flag for group in groups.values() for flag in group}
    first = getattr(kind, "help_first", [flag.name for flag in groups[FURTHER]])
    groups[FURTHER] = groups.pop(FURTHER)
    own = _hinted(tyro.conf.FlagCreatePairsOff[bool])
    asked = StructFieldSpec("version", own, False, "print the version and exit")
    shown: dict[Any, list[StructFieldSpec]] = {kind: [asked, *(flags[name] for name in first)]}
    for title, group in groups.items():
        # tyro prints the fields of a class under a title of their own.
        marker = type(title, (), {"__doc__": ""})
        shown[marker] = [flag for flag in group if flag.name not in first]
        shown[kind].append(StructFieldSpec(title, marker, tyro.MISSING_NONPROP))
    registry = ConstructorRegistry()

    @registry.struct_rule
    def listed(info: StructTypeInfo) -> StructConstructorSpec | None:
        fields = shown.get(info.type)
        return None if fields is None else StructConstructorSpec(info.type, tuple(fields))

    markers = (*MARKERS, tyro.conf.DisallowNone)
    tyro.cli(kind, args=["--help"], prog=program(), config=markers, registry=registry)
    raise SystemExit


def _collect(
    kind: Any, default: Any, groups: dict[str, list[StructFieldSpec]], title: str = FURTHER
) -> None:
    """Sort the flags of a configuration, and of those inside it, by the field that holds them."""
    spec = ConstructorRegistry.get_struct_spec(StructTypeInfo.make(kind, default, False))
    assert isinstance(spec, StructConstructorSpec)
    for field in spec.fields:
        if is_dataclass(field.type):
            _collect(field.type, field.default, groups, field.name)
        else:
            text = field.helptext() if callable(field.helptext) else field.helptext
            flag = replace(field, type=_hinted(field.type), helptext=" ".join((text or "").split()))
            groups.setdefault(title, []).append(flag)


def _hinted(kind: Any) -> Any:
    """Let the help state a default, unless there is none or the flag's own text describes it."""

    def hint(default: str) -> str:
        nothing = ("None", "False", "''", "", str(tyro.MISSING_NONPROP))
        return "" if default in nothing else f"(default: {default})"

    return Annotated[kind, tyro.conf.arg(help_behavior_hint=hint)]

"""Read stored settings: build a dataclass from JSON and check names and types."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def read(kind: type[Any], values: Any) -> Any:
    """Build a dataclass from the output of `json.loads`; unknown names are ignored.

    A class whose older files have another form defines `upgraded`, which is called first.

    Raises:
        ValueError: a value is missing, has the wrong type, or is not one of the choices.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.__name__} is {str(values)[:80]!r}; expected an object")
    values = getattr(kind, "upgraded", dict)(values)
    hints = get_type_hints(kind)
    arguments = {}
    for field in fields(kind):
        if field.name in values:
            arguments[field.name] = _value(hints[field.name], values[field.name], field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{field.name!r} is missing")
    return kind(**arguments)


def _value(hint: Any, value: Any, name: str) -> Any:
    """Check one value; convert lists to tuples and strings to paths as its type requires."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any or (hint is Path and isinstance(value, Path)):
        return value
    if is_dataclass(hint):
        return read(hint, value)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in parts:
            raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(str, parts))}")
        return value
    if origin in (Union, UnionType):
        if value is None and type(None) in parts:
            return None
        return _value(next(part for part in parts if part is not type(None)), value, name)
    if origin in (tuple, list) and isinstance(value, list | tuple):
        return origin(_value(parts[0], item, name) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _value(parts[1], item, name) for key, item in value.items()}
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{name} contains a number that is too large") from error
    if origin is not None or type(value) is not hint:
        needed = (origin or hint).__name__
        raise ValueError(f"{name} is {str(value)[:80]!r}; expected {needed}")
    return value

"""Options as plain values, for JSON and YAML, and back."""

import enum
import types
import typing
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar

Options = TypeVar("Options")


def to_plain(options: Any) -> dict[str, Any]:
    """A dataclass as nested dicts of plain values, choices as their names."""
    return {name: _plain(value) for name, value in asdict(options).items()}


def from_plain(kind: type[Options], values: dict[str, Any]) -> Options:
    """The inverse of `to_plain`. Raises TypeError for a field that `kind` does not have."""
    hints = typing.get_type_hints(kind)
    assert is_dataclass(kind)
    unknown = values.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    return kind(**{name: _typed(hints[name], value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(child) for name, child in value.items()}
    return value.value if isinstance(value, enum.Enum) else value


def _typed(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(hint, types.UnionType):
        (hint,) = (choice for choice in hint.__args__ if choice is not types.NoneType)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value)
    if typing.get_origin(hint) is dict and is_dataclass(typing.get_args(hint)[1]):
        return {name: _typed(typing.get_args(hint)[1], child) for name, child in value.items()}
    return value

"""Keys that are declared as dataclasses, as the pydantic models that check a file, and back."""

from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model, model_validator

from searchmerge.evaluators.evaluator import HINT, NoKeys

T = TypeVar("T")
Model = TypeVar("Model", bound="Strict")


class Strict(BaseModel):
    """A mapping of a file that may hold no other keys.

    Attributes:
        declared: The dataclass whose fields are keys of the mapping.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    declared: ClassVar[type[Any]] = NoKeys

    @model_validator(mode="after")
    def _keys_go_together(self) -> "Strict":
        declared_keys(self, self.declared)  # what it refuses is reported with the mapping's line
        return self


def keys_model(name: str, declared: type[Any], base: type[Model]) -> type[Model]:
    """Return a model with the keys of ``base`` and those that a dataclass declares.

    A tuple may be written as a single value, and a dataclass as the value of its first field
    where all others have a default. A key whose field has a hint must be given.

    Args:
        name: Of the model.
        declared: A dataclass.
        base: What the model is derived from.
    """
    hints = get_type_hints(declared, include_extras=True)
    keys: dict[str, Any] = {
        field.name: (_annotation(hints[field.name]), _default(field)) for field in fields(declared)
    }
    model: type[Model] = create_model(name, __base__=base, **keys)
    model.declared = declared
    return model


def declared_keys(model: Strict, declared: type[T]) -> T:
    """Return the declared part of what was read.

    Args:
        model: Of :func:`keys_model`.
        declared: The same dataclass.

    Raises:
        ValueError: If the dataclass refuses keys that do not go together.
    """
    values = {field.name: getattr(model, field.name) for field in fields(declared)}  # type: ignore[arg-type]
    return declared(
        **{
            name: declared_keys(value, value.declared) if isinstance(value, Strict) else value
            for name, value in values.items()
        }
    )


def has_key(declared: type[Any], key: object) -> bool:
    """Return whether a dataclass declares a key."""
    return any(field.name == key for field in fields(declared))


def hinted(declared: type[Any]) -> dict[str, str]:
    """Return the keys of a dataclass that must be given, each with what a user may write."""
    hints = {field.name: field.metadata.get(HINT) for field in fields(declared)}
    return {name: hint for name, hint in hints.items() if hint is not None}


def _default(field: "Field[Any]") -> Any:
    if HINT in field.metadata:
        return ...
    if field.default_factory is not MISSING:
        return pydantic.Field(default_factory=field.default_factory)
    return ... if field.default is MISSING else field.default


def _annotation(hint: Any) -> Any:
    """Return a field's type with what a file may say in its place."""
    readers: list[Callable[[Any], Any]] = []
    replaced = _replaced(hint, readers)
    for reader in readers:
        replaced = Annotated[replaced, BeforeValidator(reader)]
    return replaced


def _replaced(hint: Any, readers: list[Callable[[Any], Any]]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return Annotated[(_replaced(arguments[0], readers), *arguments[1:])]
    if origin in (Union, UnionType):
        return Union[tuple(_replaced(argument, readers) for argument in arguments)]  # noqa: UP007
    if origin is tuple:
        readers.append(_as_list)
    elif is_dataclass(hint) and isinstance(hint, type):
        first, *others = fields(hint)
        if all(_default(field) is not ... for field in others):
            readers.append(partial(_as_mapping, first.name))
        return keys_model(hint.__name__, hint, Strict)
    return hint


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float) else value


def _as_mapping(first: str, value: Any) -> Any:
    return {first: value} if isinstance(value, str) else value

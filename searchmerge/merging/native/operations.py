"""The operations of torch that are written as C++, one number at a time.

Each rounds by itself and treats NaN as torch does. What torch does otherwise than C++, or by
rules that are not followed here, is refused.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from searchmerge.errors import SearchMergeError

COMPUTED = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "int64_t",
    torch.bool: "bool",
}
"""What arithmetic is in, and the C++ type of it."""

MADE_OF_A_NUMBER = ("full_like", "zeros_like", "ones_like", "scalar_tensor")
"""Operations that read no entry, but make what is the same for all."""

SPELLED = {
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "__lshift__": "bitwise_left_shift",
    "__rshift__": "bitwise_right_shift",
}
"""Other names that torch has for an operation."""

_COMPARISONS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}

_BOUNDS: dict[str, Callable[[Sequence[int]], int]] = {
    **dict.fromkeys(("add", "sub", "rsub"), sum),
    "mul": math.prod,
    **dict.fromkeys(("where", "maximum", "minimum"), max),
    **dict.fromkeys(("neg", "abs", "relu", "to", "_to_copy", "clone"), max),
    **dict.fromkeys(("full_like", "scalar_tensor"), max),
    "zeros_like": lambda _: 0,
    "ones_like": lambda _: 1,
}
"""How large a whole number each operation returns at most, by how large its operands are."""

_SHIFTS = ("bitwise_left_shift", "bitwise_right_shift")
_BITS = 64

_OF_FLOAT32 = ("exp", "tanh")  # there are vectors of those
_OF_FLOATS = ("div", "sqrt", "floor", "ceil")


class NoSourceError(SearchMergeError):
    """A function does what is not written as C++ here; it says what."""


class Value(NamedTuple):
    """What a step of a function computes.

    Attributes:
        names: The C++ expression of one entry's number; or an object array of expressions that
            are the same for all entries.
        dtype: Of the numbers.
    """

    names: str | npt.NDArray[np.object_]
    dtype: torch.dtype


Operand = Value | bool | int | float | None
"""What an operation is given; ``None`` where a bound is left out."""


def expression(name: str, dtype: torch.dtype, operands: Sequence[str | None]) -> str:
    """Return the C++ expression of an operation.

    Args:
        name: Torch's name of it.
        dtype: What it returns.
        operands: Expressions, each in its dtype of :func:`operand_dtypes`.
    """
    if name == "bitwise_not" and dtype == torch.bool:
        name = "logical_not"
    return _EXPRESSIONS[name](*operands)


def operand_dtypes(
    name: str, dtype: torch.dtype, operands: Sequence[Operand]
) -> list[torch.dtype]:
    """Return the dtype that each operand of an operation is taken in.

    Args:
        name: Torch's name of the operation.
        dtype: What it returns.
        operands: What it is given.

    Raises:
        NoSourceError: If it is not written here, or not for that dtype.
    """
    if name not in _EXPRESSIONS:
        raise NoSourceError(f"has an operation {name}")
    if name == "where":
        return [torch.bool, dtype, dtype]
    if name.startswith("logical_"):
        return [torch.bool] * len(operands)
    if name in _COMPARISONS:
        _check_alike(name, operands)
        dtype = reduce(torch.promote_types, (_brought(operand) for operand in operands))
    if name in _OF_FLOAT32 and dtype != torch.float32:
        raise NoSourceError(f"has {name} in {dtype}")
    if name in _SHIFTS:
        _check_shift(name, operands[1])
    if name in _OF_FLOATS and not dtype.is_floating_point:
        raise NoSourceError(f"has {name} in {dtype}")
    return [dtype] * len(operands)


def whole_bound(name: str, operands: Sequence[Operand], bounds: Mapping[str, int]) -> int | None:
    """Return how large a whole number an operation returns at most; ``None`` where it may not.

    Args:
        name: Torch's name of the operation.
        operands: What it is given.
        bounds: The same of what is named.
    """
    given = [_bound(operand, bounds) for operand in operands]
    if name in _COMPARISONS or name.startswith("logical_") or name == "sign":
        return 1
    if name == "where":
        given = given[1:]
    known = [bound for bound in given if bound is not None]
    if name not in _BOUNDS or len(known) < len(given):
        return None
    return _BOUNDS[name](known)


def _bound(operand: Operand, bounds: Mapping[str, int]) -> int | None:
    if isinstance(operand, Value):
        if operand.dtype == torch.bool:
            return 1
        return bounds.get(operand.names) if isinstance(operand.names, str) else None
    if operand is None or not math.isfinite(operand) or operand % 1:
        return None
    return abs(int(operand))


def _check_alike(name: str, operands: Sequence[Operand]) -> None:
    """Refuse operands of several precisions, of which torch takes one by their shapes."""
    given = {operand.dtype for operand in operands if isinstance(operand, Value)}
    if len([dtype for dtype in given if dtype.is_floating_point]) > 1:
        raise NoSourceError(f"has {name} of several precisions")


def _check_shift(name: str, by: Operand) -> None:
    """Refuse what C++ does not define."""
    if isinstance(by, bool) or not isinstance(by, int) or not 0 <= by < _BITS:
        raise NoSourceError(f"has {name} by something else than 0 to {_BITS - 1}")


def text_of(operand: Operand, dtype: torch.dtype) -> str | None:
    """Return the expression of an operand for one entry, in a dtype.

    Raises:
        NoSourceError: If it is several numbers, or none of that dtype.
    """
    if operand is None:
        return None
    if not isinstance(operand, Value):
        return literal(operand, dtype)
    return cast(one(operand), operand.dtype, dtype)


def texts_of(operand: Operand, dtype: torch.dtype) -> npt.NDArray[np.object_]:
    """Return the expressions of what is the same for all entries, in a dtype."""
    if not isinstance(operand, Value):
        return np.array(text_of(operand, dtype), dtype=object)
    convert = np.frompyfunc(lambda text: cast(text, operand.dtype, dtype), 1, 1)
    return np.asarray(convert(operand.names), dtype=object)


def one(value: Value) -> str:
    """Return the expression of a value for one entry.

    Raises:
        NoSourceError: If it is several numbers.
    """
    if isinstance(value.names, str):
        return value.names
    if value.names.size != 1:
        raise NoSourceError("has several numbers where entries have one")
    return str(value.names.item())


def cast(text: str, given: torch.dtype, wanted: torch.dtype) -> str:
    """Return an expression in another dtype.

    Raises:
        NoSourceError: If nothing is computed in that dtype.
    """
    if wanted not in COMPUTED:
        raise NoSourceError(f"computes in {wanted}")
    if given == wanted:
        return text
    if given.is_floating_point and wanted == torch.int64:
        raise NoSourceError("makes whole numbers of real ones")  # C++ does not define all of them
    if wanted == torch.bool:
        return f"({text} != 0)"
    if given == torch.bool:  # a conversion would not be vectorised
        return f"({text} ? ({COMPUTED[wanted]})1 : ({COMPUTED[wanted]})0)"
    return f"(({COMPUTED[wanted]}){text})"


def literal(number: object, dtype: torch.dtype) -> str:
    """Return a number exactly as it is in a dtype.

    Raises:
        NoSourceError: If it is no number, or none of that dtype.
    """
    if not isinstance(number, int | float):
        raise NoSourceError(f"has an operand {number!r}")
    if dtype == torch.bool:
        return "true" if number else "false"
    if dtype == torch.int64:
        if number != number // 1 or not -(2**63) < number < 2**63:
            raise NoSourceError(f"has a whole number {number!r}")
        return f"INT64_C({int(number)})"
    if dtype not in COMPUTED:
        raise NoSourceError(f"computes in {dtype}")
    ending = "f" if dtype == torch.float32 else ""
    rounded = float(torch.tensor(number, dtype=dtype))
    if math.isnan(rounded):
        return f'__builtin_nan{ending}("")'
    if math.isinf(rounded):
        return f"({'-' if rounded < 0 else ''}__builtin_inf{ending}())"
    return f"({rounded.hex()}{ending})"


def _brought(operand: Operand) -> torch.dtype:
    """Return the dtype that an operand brings; a real number the least, as it widens none."""
    if isinstance(operand, Value):
        return operand.dtype
    if isinstance(operand, float):
        return torch.float16
    return torch.bool if isinstance(operand, bool) else torch.int64


def _between(sign: str) -> Callable[..., str]:
    return lambda a, b: f"({a} {sign} {b})"


def _clamped(a: str, low: str | None, high: str | None = None) -> str:
    inside = a if low is None else f"at_least({a}, {low})"
    return inside if high is None else f"at_most({inside}, {high})"


def _itself(a: str) -> str:
    return a


_EXPRESSIONS: dict[str, Callable[..., str]] = {
    "add": _between("+"),
    "sub": _between("-"),
    "rsub": lambda a, b: f"({b} - {a})",
    "mul": _between("*"),
    "div": _between("/"),
    "neg": lambda a: f"(-{a})",
    "abs": lambda a: f"magnitude({a})",
    "square": lambda a: f"({a} * {a})",
    "sqrt": lambda a: f"root({a})",
    "floor": lambda a: f"below({a})",
    "ceil": lambda a: f"above({a})",
    "exp": lambda a: f"expf({a})",
    "tanh": lambda a: f"tanhf({a})",
    "relu": lambda a: f"positive({a})",
    "sign": lambda a: f"({a} > 0 ? 1 : {a} < 0 ? -1 : 0)",
    # no branch: a loop with one is not vectorised
    "maximum": lambda a, b: f"(({a} > {b}) | ({a} != {a}) ? {a} : {b})",
    "minimum": lambda a, b: f"(({a} < {b}) | ({a} != {a}) ? {a} : {b})",
    "clamp": _clamped,
    "clamp_min": _clamped,
    "clamp_max": lambda a, high: _clamped(a, None, high),
    "where": lambda condition, a, b: f"({condition} ? {a} : {b})",
    "bitwise_and": _between("&"),
    "bitwise_or": _between("|"),
    "bitwise_xor": _between("^"),
    "bitwise_not": lambda a: f"(~{a})",
    "bitwise_left_shift": _between("<<"),
    "bitwise_right_shift": _between(">>"),
    "logical_not": lambda a: f"(!{a})",
    "logical_and": _between("&"),
    "logical_or": _between("|"),
    **{name: _between(sign) for name, sign in _COMPARISONS.items()},
    **dict.fromkeys(("to", "_to_copy", "clone", "full_like", "scalar_tensor"), _itself),
    "zeros_like": lambda: "0",
    "ones_like": lambda: "1",
}
"""The expression of each operation, by those of its operands."""

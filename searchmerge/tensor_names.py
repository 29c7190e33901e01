"""Names of many tensors in few lines: ``layers.{0..11}.norm.weight`` stands for twelve."""

import re
from collections.abc import Iterable

from searchmerge.errors import SpecError

_MOST = 100_000  # names that one pattern may stand for

_NUMBERS = re.compile(r"\{(\d+(?:\.\.\d+)?(?:,\d+(?:\.\.\d+)?)*)\}")
_DIGITS = re.compile(r"(\d+)")
_PLAIN = re.compile(r"0|[1-9]\d*")


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return names as a person sorts them: layer 2 before layer 10."""
    return tuple(sorted(names, key=_place))


def _place(name: str) -> list[tuple[int, str]]:
    """Return what a name is sorted by: its text and its numbers in turn."""
    return [(int(part) if i % 2 else 0, part) for i, part in enumerate(_DIGITS.split(name))]


def expand(pattern: str) -> list[str]:
    """Return the names that a pattern stands for: one for each of the numbers in braces.

    Raises:
        SpecError: If they are more than any model has.
    """
    match = _NUMBERS.search(pattern)
    if match is None:
        return [pattern]
    numbers: list[int] = []
    for part in match[1].split(","):
        first, _, last = part.partition("..")
        run = range(int(first), int(last or first) + 1)
        _check_count(pattern, len(numbers) + len(run))
        numbers += run
    rest = expand(pattern[match.end() :])
    _check_count(pattern, len(numbers) * len(rest))
    return [f"{pattern[: match.start()]}{number}{tail}" for number in numbers for tail in rest]


def _check_count(pattern: str, n_names: int) -> None:
    if n_names > _MOST:
        raise SpecError(f"{pattern!r} stands for {n_names} tensors; allowed are up to {_MOST}")


def compress(names: Iterable[str]) -> list[str]:
    """Return few patterns that stand for exactly these names, in the order of the first of each.

    Names that differ in their first number alone, which is the layer's, become one.
    """
    layers: dict[tuple[str, ...], list[int]] = {}
    for name in in_order(names):
        parts = re.split(r"(?<![^.])(\d+)(?![^.])", name, maxsplit=1)
        if len(parts) == 3 and _PLAIN.fullmatch(parts[1]):
            layers.setdefault((parts[0], parts[2]), []).append(int(parts[1]))
        else:
            layers[(name,)] = []
    return [
        f"{around[0]}{_shown(numbers)}{around[1]}" if numbers else around[0]
        for around, numbers in layers.items()
    ]


def _shown(numbers: list[int]) -> str:
    """Return ascending numbers as text: a single one as it is, others as runs in braces."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return "{" + ",".join("..".join(map(str, run)) for run in runs) + "}"

"""Names of many tensors in few lines: ``layers.{0..11}.norm.weight`` stands for twelve.

Numbers in braces that are part of a name have braces twice: ``layers{{3}}.w`` is ``layers{3}.w``.
"""

import re
from collections.abc import Iterable

from searchmerge.errors import SpecError

_MOST = 100_000  # names that one pattern may stand for

_RUN = r"[0-9]+(?:\.\.[0-9]+)?"
_NUMBERS = rf"\{{{_RUN}(?:,{_RUN})*\}}"
_NAMED = re.compile(_NUMBERS)
_WRITTEN = re.compile(rf"\{{(?P<named>{_NUMBERS})\}}|(?P<numbers>{_NUMBERS})")
_DIGITS = re.compile(r"(\d+)")
_PLAIN = re.compile(r"0|[1-9][0-9]*")


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
    names, end = [""], 0
    for match in _WRITTEN.finditer(pattern):
        before, end = pattern[end : match.start()], match.end()
        parts = [match["named"]] if match["named"] else _numbers(pattern, match["numbers"])
        _check_count(pattern, len(names) * len(parts))
        names = [f"{name}{before}{part}" for name in names for part in parts]
    return [f"{name}{pattern[end:]}" for name in names]


def _numbers(pattern: str, in_braces: str) -> list[str]:
    """Return the numbers that the runs in a pattern's braces stand for."""
    numbers: list[str] = []
    for run in in_braces[1:-1].split(","):
        first, _, last = run.partition("..")
        found = range(int(first), int(last or first) + 1)
        _check_count(pattern, len(numbers) + len(found))
        numbers += map(str, found)
    return numbers


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
        # what a layer's number stands between ends and begins with a dot, so that no braces meet
        _shown(numbers).join(_NAMED.sub(r"{\g<0>}", part) for part in around)
        for around, numbers in layers.items()
    ]


def _shown(numbers: list[int]) -> str:
    """Return ascending numbers as text: a single one as it is, others as runs in braces."""
    if len(numbers) <= 1:
        return "".join(map(str, numbers))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return "{" + ",".join("..".join(map(str, run)) for run in runs) + "}"

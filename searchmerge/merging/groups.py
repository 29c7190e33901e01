"""Which group and which depth a parameter belongs to, by its name."""

import re
from collections.abc import Sequence

from searchmerge.errors import SpecError
from searchmerge.plan import Groups

REST = "rest"
"""As the last pattern: the parameters that no other pattern matches."""

_INDEX = re.compile(r"^(.*?)(?:^|\.)(\d+)(?:\.|$)")
_BEFORE = re.compile(r"embed|wte|wpe|patch|(^|\.)shared\.|cls_token|position")


def assign_groups(names: Sequence[str], groups: Groups) -> dict[str, int]:
    """Return the group of each parameter.

    By depth, layers are told apart by the first number in a name, each stack (the text before
    the number) on its own, and cut into ``depth`` blocks of as equal length as can be; what lies
    before the layers (embeddings) is in the first block, what lies behind (norm, head) in the
    last.

    Raises:
        SpecError: If there are fewer layers than blocks, a pattern matches nothing, a name
            matches two patterns, or none.
    """
    if groups.depth is not None:
        return _by_depth(names, groups.depth)
    if groups.patterns:
        return _by_pattern(names, groups.patterns)
    return dict.fromkeys(names, 0)


def depth_positions(names: Sequence[str]) -> dict[str, float]:
    """Return the relative depth of each parameter: 0 in the first layer, 1 in the last."""
    layers, counts = _layers(names)
    positions = {}
    for name in names:
        if name in layers:
            stack, index = layers[name]
            positions[name] = index / max(1, counts[stack] - 1)
        else:
            positions[name] = 0.0 if _BEFORE.search(name) else 1.0
    return positions


def _layers(names: Sequence[str]) -> tuple[dict[str, tuple[str, int]], dict[str, int]]:
    layers: dict[str, tuple[str, int]] = {}
    counts: dict[str, int] = {}
    for name in names:
        if match := _INDEX.match(name):
            stack, index = match[1], int(match[2])
            layers[name] = (stack, index)
            counts[stack] = max(counts.get(stack, 0), index + 1)
    return layers, counts


def _by_depth(names: Sequence[str], depth: int) -> dict[str, int]:
    layers, counts = _layers(names)
    most = max(counts.values(), default=0)
    if depth > most:
        raise SpecError(
            f"groups: depth is {depth}, but the model has {most} layers; allowed is 1 to {most}"
        )
    found = {}
    for name in names:
        if name in layers:
            stack, index = layers[name]
            found[name] = index * depth // counts[stack]
        else:
            found[name] = 0 if _BEFORE.search(name) else depth - 1
    return found


def _by_pattern(names: Sequence[str], patterns: Sequence[str]) -> dict[str, int]:
    searched = patterns[:-1] if patterns[-1] == REST else patterns
    try:
        compiled = [re.compile(pattern) for pattern in searched]
    except re.error as error:
        raise SpecError(f"groups: {error.pattern!r} is no regular expression: {error}") from error
    found = {}
    for name in names:
        hits = [i for i, pattern in enumerate(compiled) if pattern.search(name)]
        if len(hits) > 1:
            raise SpecError(
                f"groups: patterns {patterns[hits[0]]!r} and {patterns[hits[1]]!r} both match "
                f"parameter {name!r}; each parameter belongs to one group"
            )
        if not hits and len(searched) == len(patterns):
            raise SpecError(
                f"groups: no pattern matches parameter {name!r}; add {REST!r} as the last one"
            )
        found[name] = hits[0] if hits else len(searched)
    if unused := set(range(len(patterns))) - set(found.values()):
        raise SpecError(f"groups: pattern {patterns[min(unused)]!r} matches no parameter")
    return found

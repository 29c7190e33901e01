"""Which group and which depth a parameter belongs to, by its name."""

import re
from collections.abc import Sequence
from functools import lru_cache

from searchmerge.errors import SpecError
from searchmerge.plan import REST, Groups

_LAYER = re.compile(r"^(?P<stack>(?:[^.]*\D[^.]*\.)*?)(?P<index>\d+)(?:\.|$)")
_BEFORE = re.compile(
    r"(^|[._])(embed(?!_out)\w*|\w+_embed|\w*embeddings?|wte|wpe|shared|tokens?"
    r"|patch\w*|cls_token|pos_\w*|position\w*|conv1|ln_pre|pre_\w*norm|stem)([._]|$)"
)


def assign_groups(names: Sequence[str], groups: Groups) -> dict[str, int]:
    """Return the group of each parameter, from 0.

    By depth: the first whole component of a dotted name that is a number tells its layer, and
    what comes before it the stack (an encoder and a decoder are two). Each stack is cut into
    ``depth`` blocks of consecutive layers, as equal in length as can be. What lies before the
    layers, such as embeddings, is in the first block; all else, such as a final norm or a head,
    in the last.

    By patterns: each is searched in the name with :func:`re.search`; a last pattern ``rest``
    takes what no other matches.

    By tensors: each is a group of its own, and every parameter is one of them.

    Raises:
        SpecError: If there are fewer layers than blocks; if a pattern is no regular expression
            or matches nothing; if a name matches two patterns, or none; or if tensors are named
            that are not there, or not all that are.
    """
    return dict(_assign(tuple(names), groups))


@lru_cache(maxsize=64)
def _assign(names: tuple[str, ...], groups: Groups) -> dict[str, int]:
    if groups.depth is not None:
        return _by_depth(names, groups.depth)
    if groups.patterns:
        return _by_pattern(names, groups.patterns)
    if groups.tensors:
        return _by_tensor(names, groups.tensors)
    return dict.fromkeys(names, 0)


def depth_positions(names: Sequence[str]) -> dict[str, float]:
    """Return the relative depth of each parameter, 0 in the first layer and 1 in the last.

    Layers and what lies around them are told apart as in :func:`assign_groups`. A stack of one
    layer is at 0.

    Raises:
        SpecError: If no name has a layer.
    """
    return dict(_positions(tuple(names)))


@lru_cache(maxsize=64)
def _positions(names: tuple[str, ...]) -> dict[str, float]:
    ranks, lengths = _layers(names)
    if not ranks:
        raise SpecError(f"depth: no parameter's name has a layer number, e.g. {_some(names)}")
    return {
        name: ranks[name][1] / max(1, lengths[ranks[name][0]] - 1)
        if name in ranks
        else float(not _BEFORE.search(name))
        for name in names
    }


def _layers(names: Sequence[str]) -> tuple[dict[str, tuple[str, int]], dict[str, int]]:
    """Return each layered name's stack and rank in it, and the number of layers per stack."""
    places: dict[str, tuple[str, int]] = {}
    indices: dict[str, set[int]] = {}
    for name in names:
        if match := _LAYER.match(name):
            places[name] = (match["stack"], int(match["index"]))
            indices.setdefault(match["stack"], set()).add(int(match["index"]))
    order = {
        stack: {i: k for k, i in enumerate(sorted(numbers))} for stack, numbers in indices.items()
    }
    ranks = {name: (stack, order[stack][index]) for name, (stack, index) in places.items()}
    return ranks, {stack: len(numbers) for stack, numbers in indices.items()}


def _by_depth(names: Sequence[str], depth: int) -> dict[str, int]:
    ranks, lengths = _layers(names)
    most = max(lengths.values(), default=0)
    if not most:
        raise SpecError(
            f"groups: depth is {depth}, but no parameter's name has a layer number, "
            f"e.g. {_some(names)}"
        )
    if depth > most:
        raise SpecError(f"groups: depth is {depth}; the model has {most} layers: 1 to {most}")
    group_of = {}
    for name in names:
        if name in ranks:
            stack, rank = ranks[name]
            group_of[name] = rank * depth // lengths[stack]
        else:
            group_of[name] = 0 if _BEFORE.search(name) else depth - 1
    return group_of


def _by_pattern(names: Sequence[str], patterns: Sequence[str]) -> dict[str, int]:
    searched = patterns[:-1] if patterns[-1] == REST else patterns
    compiled = [_compile(pattern) for pattern in searched]
    group_of = {}
    for name in names:
        hits = [i for i, pattern in enumerate(compiled) if pattern.search(name)]
        if len(hits) > 1:
            raise SpecError(
                f"groups: patterns {patterns[hits[0]]!r} and {patterns[hits[1]]!r} both match "
                f"parameter {name!r}; each parameter belongs to one group"
            )
        if not hits and len(searched) == len(patterns):
            raise SpecError(
                f"groups: no pattern matches parameter {name!r}; "
                f"add {REST!r} as the last one, for what is left"
            )
        group_of[name] = hits[0] if hits else len(searched)
    if unused := set(range(len(patterns))) - set(group_of.values()):
        raise SpecError(
            f"groups: pattern {patterns[min(unused)]!r} matches no parameter; "
            f"there are e.g. {_some(names)}"
        )
    return group_of


def _by_tensor(names: Sequence[str], tensors: Sequence[str]) -> dict[str, int]:
    group_of = {tensor: group for group, tensor in enumerate(tensors)}
    merged = set(names)
    unused = [tensor for tensor in tensors if tensor not in merged]
    if missing := [name for name in names if name not in group_of]:
        raise SpecError(
            f"groups: no row is for parameter {missing[0]!r} ({len(missing)} of {len(names)} have "
            f"none); there are rows for e.g. {_some(unused or tensors)}"
            + (", which are no parameters that are merged" if unused else "")
        )
    if unused:
        raise SpecError(
            f"groups: a row is for tensor {unused[0]!r}, which is no parameter that is merged; "
            f"there are e.g. {_some(names)}"
        )
    return {name: group_of[name] for name in names}


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SpecError(f"groups: {pattern!r} is no regular expression: {error}") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) or "none at all"

"""What a task may say of how answers are generated: lm-eval's arguments and transformers' own."""

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from searchmerge.checkpoints.files import Kind
from searchmerge.errors import SpecError

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one argument; lm-eval takes the first that is there."""


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _from(least: int) -> Kind:
    return Kind(f"a whole number from {least}", lambda v: _is_whole(v) and v >= least)


_TEXTS = Kind(
    "a text or a list of texts",
    lambda v: isinstance(v, str) or (isinstance(v, list) and all(isinstance(t, str) for t in v)),
)
_SWITCH = Kind("true or false", lambda v: isinstance(v, bool))
_NUMBER = Kind("a number", _is_number)
_PART = Kind("a number above 0, up to 1", lambda v: _is_number(v) and 0 < v <= 1)
_SHARE = Kind("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
_KINDS: Mapping[str, Kind] = {
    "until": _TEXTS,
    **dict.fromkeys(_LENGTHS, _from(1)),
    "do_sample": _SWITCH,
    "temperature": Kind("a number from 0", lambda v: _is_number(v) and v >= 0),
    "top_k": _from(0),
    "top_p": _PART,
    "top_h": _PART,
    "min_p": _SHARE,
    "typical_p": _PART,
    "epsilon_cutoff": _SHARE,
    "eta_cutoff": _SHARE,
    "repetition_penalty": Kind("a number above 0", lambda v: _is_number(v) and v > 0),
    "no_repeat_ngram_size": _from(0),
    "min_new_tokens": _from(0),
    "num_beams": _from(1),
    "length_penalty": _NUMBER,
    "early_stopping": Kind("true, false or never", lambda v: isinstance(v, bool) or v == "never"),
    "renormalize_logits": _SWITCH,
}
_MAY_BE_NONE = frozenset(_KINDS) - {"until", "temperature", *_LENGTHS}


def check_generation(arguments: Mapping[str, Any], asked: Mapping[str, Any], where: str) -> None:
    """Refuse arguments of generation that would fail, or not do what they say.

    Args:
        arguments: All of a task: its own, and in their place those of the study.
        asked: Those of the study.
        where: The task's key in the study, for messages.

    Raises:
        SpecError: For the first that is wrong.
    """
    for key, value in arguments.items():
        _check(key, value, where)
    given = [key for key in _LENGTHS if key in arguments]
    if len(given) > 1:
        raise SpecError(
            f"{where}.generation: {' and '.join(given)} are the same argument, of which lm-eval "
            f"takes the first ({arguments[given[0]]}); give that one"
        )
    warm = float(arguments.get("temperature") or 0)
    if arguments.get("do_sample") and "temperature" in arguments and not warm:
        raise SpecError(
            f"{where}.generation: do_sample: true with temperature: 0, at which nothing can be "
            "drawn; give a temperature above 0, or do_sample: false"
        )
    is_left_out = arguments.get("do_sample") is False and "do_sample" not in asked
    if is_left_out and float(asked.get("temperature") or 0):
        raise SpecError(
            f"{where}.generation.temperature: the task has do_sample: false, with which lm-eval "
            f"takes no temperature; give do_sample: true beside it"
        )


def _check(key: str, value: Any, where: str) -> None:
    if key not in _KINDS:
        close = get_close_matches(key, _KINDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise SpecError(
            f"{where}.generation.{key}: no such argument{hint} (there are: {', '.join(_KINDS)})"
        )
    kind = _KINDS[key]
    if (value is None and key in _MAY_BE_NONE) or kind.allows(value):
        return
    raise SpecError(f"{where}.generation.{key}: {kind.words} is needed; found {value!r}")


def draws_answers(arguments: Mapping[str, Any]) -> bool:
    """Return whether answers are drawn at random by arguments of generation, as in lm-eval.

    Where they do not say, a temperature says it.
    """
    asked = arguments.get("do_sample")
    return bool(arguments.get("temperature")) if asked is None else bool(asked)

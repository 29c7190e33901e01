"""Drawing tokens at random such that an answer is the same whatever is answered beside it.

``model.generate`` draws the tokens of all rows from one global state, so that what a row gets
depends on its batch. Here each row has a seed, and each of its steps a number of its own.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_UNSET: Mapping[str, Any] = {"temperature": 1.0, "top_k": 50}
"""What transformers takes where neither a call nor the model's generation config says."""

_WARPERS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("TemperatureLogitsWarper", lambda value: value != 1),
    "top_h": ("TopHLogitsWarper", lambda value: True),
    "top_k": ("TopKLogitsWarper", lambda value: value != 0),
    "top_p": ("TopPLogitsWarper", lambda value: value < 1),
    "min_p": ("MinPLogitsWarper", lambda value: True),
    "typical_p": ("TypicalLogitsWarper", lambda value: value < 1),
    "epsilon_cutoff": ("EpsilonLogitsWarper", lambda value: 0 < value < 1),
    "eta_cutoff": ("EtaLogitsWarper", lambda value: 0 < value < 1),
}
"""Entries of a generation config that warp logits where tokens are drawn, in the order of
``model.generate``: the class that does it, and whether a value of it does anything."""


def seed_of(*what: object) -> int:
    """Return a seed in [0, 2^63) that is made of what is to be drawn, in any process the same."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def setting(model: Any, arguments: Mapping[str, Any], key: str) -> Any:
    """Return an entry of the generation config that a call with some arguments has."""
    if key in arguments:
        return arguments[key]
    value = getattr(model.generation_config, key, None)
    return _UNSET.get(key) if value is None else value


def warpers(model: Any, arguments: Mapping[str, Any], device: torch.device) -> Any:
    """Return what ``model.generate`` applies to logits only where it samples, in its order.

    Args:
        model: A model of transformers.
        arguments: Of ``model.generate``.
        device: Of the logits.
    """
    import transformers

    warping = transformers.LogitsProcessorList()
    for key, (name, matters) in _WARPERS.items():
        value = setting(model, arguments, key)
        if value is not None and matters(value):
            more = {"device": str(device)} if name == "EtaLogitsWarper" else {}
            warping.append(getattr(transformers, name)(value, **more))
    return warping


class Draws:
    """A logits processor that leaves each row one token, drawn by the row's own numbers.

    The number of a row's step, uniform in [0, 1), chooses the token at which the cumulative
    probability exceeds it.

    Args:
        warped: What is done to the logits before; see :func:`warpers`.
        seeds: Of each row.
        n_prompt: Tokens that stand before the first that is drawn.
        n_steps: Tokens that are drawn at most.
    """

    def __init__(self, warped: Any, seeds: Sequence[int], n_prompt: int, n_steps: int) -> None:
        self._warped = warped
        self._n_prompt = n_prompt
        draws = [
            torch.rand(n_steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        self._numbers = torch.stack(draws).double()  # of float32, so that none rounds to 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits of which each row's drawn token alone is finite."""
        probabilities = self._warped(input_ids, scores).double().softmax(-1)
        sums = probabilities.cumsum(-1)
        numbers = self._numbers[:, input_ids.shape[1] - self._n_prompt].to(scores.device)
        drawn = (sums <= numbers[:, None] * sums[:, -1:]).sum(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

"""One step of greedy decoding: every row's likeliest next token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from searchmerge.evaluators.causal.model import sent, takes
from searchmerge.evaluators.causal.stopping import NOT_FINITE


@dataclass
class Begun:
    """Rows that have been run up to their next token.

    Attributes:
        tokens: The next token of each, ``(n_rows, 1)``.
        positions: Its position, ``(n_rows, 1)``.
        mask: 1 where a row may look, 0 where it is padding, ``(n_rows, n_past)``.
        past: Keys and values of each layer; ``None`` for a layer that uses those of another.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    past: list[tuple[Tensor, Tensor] | None]

    def some(self, places: Tensor) -> "Begun":
        """Return the rows at some places, ``(n_left,)`` int64 on any device."""
        rows = sent(places, self.tokens.device)
        past = [None if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.past]
        return Begun(self.tokens[rows], self.positions[rows], self.mask[rows], past)


def next_logits(model: nn.Module, **inputs: Any) -> Tensor:
    """Return the logits of the last token of every row, ``(n_rows, vocabulary)``."""
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = 1
    logits: Tensor = model(use_cache=True, **inputs).logits
    return logits[:, -1]


def choice(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens, and the same with -1 where the logits are not finite."""
    largest, chosen = logits.max(-1)
    return chosen, chosen.masked_fill(~torch.isfinite(largest), NOT_FINITE)

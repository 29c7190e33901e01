"""Log-probabilities of the tokens that are read, from logits, where the logits lie."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from searchmerge.evaluators.causal.layout import Batch
from searchmerge.evaluators.causal.model import sent

_LOGIT_ROWS = {"cpu": 16, "cuda": 1024}
"""Rows of logits that are reduced at a time: no second copy of all is made, and a CPU finds them
in its caches."""

_LOG2_E = math.log2(math.e)


class Reading(NamedTuple):
    """What was read of a batch, where its logits lay.

    Attributes:
        values: The log-probability of every token read, float32.
        greedy: Whether it is the likeliest: of equal logits, the first.
    """

    values: Tensor
    greedy: Tensor


def read(logits: Tensor, batch: Batch) -> Reading:
    """Return what a batch reads of its kept logits, ``(n_kept, vocabulary)``.

    On a GPU nothing waits for it: what is returned may still be computed.
    """
    return read_there(logits, batch) if logits.device.type != "cpu" else read_here(logits, batch)


def read_there(logits: Tensor, batch: Batch) -> Reading:
    """Read where it costs nothing to look for the first of the largest logits.

    A GPU is as fast as its memory here: 16-bit logits are widened while they are subtracted from,
    not before.
    """
    at, targets = sent(batch.at, logits.device), sent(batch.targets, logits.device)
    chosen = logits[at, targets].float()
    first = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    totals = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    n_rows = _LOGIT_ROWS["cuda"]
    buffer = torch.empty_like(logits[:n_rows], dtype=torch.float32)
    for start in range(0, len(logits), n_rows):
        rows = slice(start, start + n_rows)
        largest, first[rows] = logits[rows].max(-1)
        part = torch.sub(logits[rows], largest.float()[:, None], out=buffer[: len(largest)])
        totals[rows] = part.exp_().sum(-1).log_().add_(largest)
    return Reading(chosen - totals[at], first[at] == targets)


def read_here(logits: Tensor, batch: Batch) -> Reading:
    """Read on a CPU, where it takes long to look for the first of the largest logits.

    It only matters where a continuation's tokens are all among the largest.
    """
    chosen = logits[batch.at, batch.targets].float()
    totals, largest = _reduce(logits)
    greedy = (chosen == largest[batch.at]).numpy()
    owners, at = batch.owners.numpy(), batch.at.numpy()
    (doubtful,) = np.nonzero(greedy & (np.bincount(owners, ~greedy)[owners] == 0))
    for place in doubtful:  # numpy finds it in a fraction of torch's time
        first = logits[at[place]].float().numpy().argmax()
        greedy[place] = first == batch.targets[place]
    return Reading(chosen - totals[batch.at], torch.from_numpy(greedy))


def read_with_gradient(logits: Tensor, batch: Batch) -> Tensor:
    """Return the log-probability of every token read, float32, which can be differentiated."""
    at, targets = sent(batch.at, logits.device), sent(batch.targets, logits.device)
    return logits[at, targets].float() - logits.float().logsumexp(-1)[at]


def _reduce(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's log-sum-exp and its largest logit, ``(n_rows,)`` float32 each.

    A few rows at a time, in a buffer that stays in a CPU's cache: whole-tensor ``logsumexp`` takes
    several times as long. So does ``exp`` beside ``exp2`` of as many entries.

    Args:
        logits: ``(n_rows, vocabulary)``, any float dtype.
    """
    n_rows = _LOGIT_ROWS["cpu"]
    buffer = logits.new_empty(min(n_rows, len(logits)), logits.shape[-1], dtype=torch.float32)
    totals, largest = buffer.new_empty(2, len(logits))
    for start in range(0, len(logits), n_rows):
        rows = slice(start, start + n_rows)
        part = buffer[: len(logits[rows])]
        wide = logits[rows] if logits.dtype == part.dtype else part.copy_(logits[rows])
        torch.amax(wide, -1, out=largest[rows])
        torch.sub(wide, largest[rows, None], out=part)
        torch.sum(part.mul_(_LOG2_E).exp2_(), -1, out=totals[rows])
    return totals.log_().add_(largest), largest

"""Batched generation with a causal language model: prompts padded on the left, stop sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from searchmerge.evaluators.packing import Tokens

_MAX_ROWS = 64
"""Prompts that are generated together at most: each costs as many steps as the longest one."""

_CACHE_FACTOR = 32
"""Tokens of a batch's key-value cache, per token of a scoring batch."""


_SAMPLING_SEED = 1234
"""Where a task asks for sampling, every call draws the same numbers."""


class NonFiniteLogits(Exception):
    """The model gave a NaN or an infinity where the next token is chosen.

    Attributes:
        row: Index of the prompt.
    """

    def __init__(self, row: int) -> None:
        super().__init__(f"logits of prompt {row} are not finite")
        self.row = row


@dataclass(frozen=True)
class GenerationOptions:
    """How the prompts of one call are continued.

    Attributes:
        stop: Text at which a continuation ends.
        max_new_tokens: Tokens that are generated at most, 1 or more.
        arguments: Further arguments of ``model.generate``.
    """

    stop: tuple[str, ...]
    max_new_tokens: int
    arguments: dict[str, Any]


class _Finite:
    """A logits processor that refuses logits that are not finite."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = torch.isfinite(scores.amax(-1))
        if not finite.all():
            first = int((~finite).nonzero()[0, 0])
            raise NonFiniteLogits(self._rows[first * len(self._rows) // len(finite)])
        return scores


class _StopSequences:
    """A stopping criterion: a row is done once its new text holds a stop sequence.

    The last tokens of every row are decoded after every step: as many as the longest sequence
    has, and two more, since a model may spell it in other tokens than the tokenizer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in self._stop]
        self._look_back = max(lengths, default=0) + 2
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        start = max(self._prompt_tokens, input_ids.shape[1] - self._look_back)
        texts = self._tokenizer.batch_decode(input_ids[:, start:])
        done = [any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Tokens],
    options: GenerationOptions,
    batch_tokens: int,
) -> list[list[int]]:
    """Return the new tokens of every prompt; what follows a stop sequence is of no meaning.

    Where the options ask for sampling, the same weights and prompts give the same tokens; the
    global random state is left as it was.

    Args:
        model: A model of transformers that generates.
        tokenizer: Its tokenizer, with a padding token.
        prompts: Token ids, one or more each.
        options: How to continue.
        batch_tokens: Tokens of a batch of prompts, padding included.

    Raises:
        NonFiniteLogits: If the logits of a prompt are not finite.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
    results: list[list[int]] = [[]] * len(prompts)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_SAMPLING_SEED)
        start = 0
        while start < len(order):
            longest = len(prompts[order[start]]) + options.max_new_tokens
            n_rows = max(1, min(_MAX_ROWS, _CACHE_FACTOR * batch_tokens // longest))
            rows = order[start : start + n_rows]
            new = _generate_batch(model, tokenizer, {i: prompts[i] for i in rows}, options)
            for i, tokens in zip(rows, new, strict=True):
                results[i] = tokens
            start += n_rows
    return results


def _generate_batch(
    model: Any, tokenizer: Any, prompts: Mapping[int, Tokens], options: GenerationOptions
) -> list[list[int]]:
    """Return the new tokens of each prompt; the longest prompt comes first."""
    width = max(map(len, prompts.values()))
    tokens = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts.values()):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    arguments = {"max_length": width + options.max_new_tokens} | options.arguments
    sequences: Tensor = model.generate(
        input_ids=tokens.to(device),
        attention_mask=mask.to(device),
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[_StopSequences(tokenizer, options.stop, width)],
        logits_processor=[_Finite(list(prompts))],
        use_cache=True,
        **arguments,
    )
    return sequences[:, width:].tolist()

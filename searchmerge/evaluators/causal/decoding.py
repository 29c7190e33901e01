"""Greedy decoding of a batch of prompts: every step, each row's likeliest token.

On a CPU the cache of keys and values grows with every step, and rows that are done leave it. On
a GPU steps are recorded and replayed (``recording``); rows leave when so few are left that it pays
to record anew. A model whose step cannot be recorded is decoded as on a CPU.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from searchmerge.evaluators.causal.documents import Tokens
from searchmerge.evaluators.causal.model import Prefix, device_of, sent
from searchmerge.evaluators.causal.recording import (
    RECORD_FROM,
    NotRecordedError,
    RecordedSteps,
    Recorder,
    graphs_of,
)
from searchmerge.evaluators.causal.steps import Begun, choice, next_logits
from searchmerge.evaluators.causal.stopping import Said, StopSequences

_logger = logging.getLogger(__name__)

_LEAVE = 0.9
"""Rows that are done leave a cache that grows when this part of them is left, or less: each time
it is copied."""


class Decoder:
    """Decodes batches of prompts.

    Args:
        recorder: Returns what records a model's steps; ``None`` where its steps are launched one
            by one.
    """

    def __init__(self, recorder: Callable[[nn.Module], Recorder | None] | None = None) -> None:
        self._recorder = recorder or graphs_of
        self._refused: WeakSet[nn.Module] = WeakSet()

    def decode(
        self,
        model: nn.Module,
        prompts: Mapping[int, Tokens],
        prefix: Prefix,
        stops: StopSequences,
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Return the new tokens of every prompt, an end token included.

        Args:
            model: What gives the logits.
            prompts: Index of each prompt, and its tokens after the prefix that all share.
            prefix: What stands before the prompts; may be empty.
            stops: The text that ends a row.
            max_new_tokens: Tokens of a row at most, 1 or more.

        Raises:
            NonFiniteLogits: If the logits of a prompt are not finite.
        """
        batch = _Batch(model, prompts, prefix, stops, max_new_tokens)
        record = None if model in self._refused else self._recorder(model)
        if record is None or max_new_tokens <= RECORD_FROM:
            return batch.decode_growing()
        try:
            return batch.decode_recorded(record)
        except NotRecordedError as error:
            self._refused.add(model)
            _logger.warning(
                "a step of %s cannot be recorded, so that generating takes longer: %s",
                type(model).__name__,
                " ".join(str(error).split())[:200],
            )
        return batch.decode_growing()


class _Batch:
    """Prompts that are decoded together; for the arguments see ``Decoder.decode``."""

    def __init__(
        self,
        model: Any,
        prompts: Mapping[int, Tokens],
        prefix: Prefix,
        stops: StopSequences,
        max_new_tokens: int,
    ) -> None:
        self._stops, tokenizer = stops, stops.tokenizer
        self._model = model
        self._prompts = list(prompts)
        self._prefix = prefix
        self._tokens, self._mask = padded(list(prompts.values()), tokenizer.pad_token_id)
        self._n_steps = max_new_tokens
        end = model.generation_config.eos_token_id
        self._ends = {*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id}

    def decode_growing(self) -> list[list[int]]:
        """Return the new tokens of every row; a step is looked at before the next one begins."""
        said = self._nothing_said()
        cache = self._prefix.rows(said.n_rows)
        inputs, mask, positions = self._inputs()
        for _ in range(self._n_steps):
            logits = next_logits(
                self._model,
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
            )
            chosen, told = choice(logits)
            said.add(told.tolist())
            left = said.left()
            if not left:
                break
            inputs, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(said.n_rows, 1)], 1)
            if len(left) <= _LEAVE * said.n_rows:
                kept = torch.tensor(left)  # on the CPU: a model's layers may lie on many devices
                cache.batch_select_indices(kept)
                inputs, positions, mask = inputs[kept], positions[kept], mask[kept]
                said.keep(left)
        return said.tokens

    def decode_recorded(self, record: Recorder) -> list[list[int]]:
        """Return the new tokens of every row; the host looks at steps that are some steps past.

        Raises:
            NotRecordedError: If a step cannot be recorded.
        """
        said = self._nothing_said()
        begun, told = self._begin()
        said.add(told.tolist())
        n_steps = self._n_steps - 1
        while n_steps and (left := said.left()):
            if len(left) < said.n_rows:
                begun = begun.some(torch.tensor(left))
                said.keep(left)
            steps = RecordedSteps(self._model, begun, n_steps)
            del begun  # before the next cache is made
            steps.run(record, said)
            begun, n_steps = steps.begun(), n_steps - steps.n_run
        return said.tokens

    def _nothing_said(self) -> Said:
        return Said(self._prompts, self._ends, self._stops)

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens of the first pass, the mask and their positions."""
        device, n_past = device_of(self._model), self._prefix.n_tokens
        mask = torch.cat([self._mask.new_ones(len(self._mask), n_past), self._mask], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, n_past:]
        return sent(self._tokens, device), sent(mask, device), sent(positions, device)

    def _begin(self) -> tuple[Begun, Tensor]:
        """Run the prompts; return what the next step needs, and what has been chosen."""
        cache = self._prefix.rows(len(self._prompts))
        inputs, mask, positions = self._inputs()
        logits = next_logits(
            self._model,
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
        )
        chosen, told = choice(logits)
        past = [
            None if layer.keys is None else (layer.keys, layer.values) for layer in cache.layers
        ]
        return Begun(chosen[:, None], positions[:, -1:] + 1, mask, past), told


def padded(prompts: Sequence[Tokens], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return prompts padded on the left, and their mask, ``(n_rows, longest)`` int64 each."""
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return tokens, mask

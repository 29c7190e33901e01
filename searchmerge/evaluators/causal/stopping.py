"""What the rows of a batch say, and when each has said all."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

NOT_FINITE = -1
"""Stands for a token where the logits are not finite."""


class NonFiniteLogits(Exception):
    """The model gave a NaN or an infinity where the next token is chosen.

    Attributes:
        row: Index of the prompt.
    """

    def __init__(self, row: int) -> None:
        super().__init__(f"logits of prompt {row} are not finite")
        self.row = row


class StopSequences:
    """A stopping criterion: a row is done once its new text holds a stop sequence.

    The last tokens of every row are decoded after every step: as many as the longest sequence
    has, and two more, since a model may spell it in other tokens than the tokenizer.

    Args:
        tokenizer: The model's.
        stop: The sequences; an empty one stops nothing.
        prompt_tokens: Tokens before the new text, where ``model.generate`` asks.

    Attributes:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_tokens: int) -> None:
        self.tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in self._stop]
        self._look_back = max(lengths, default=0) + 2
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return for each row whether it is done: what ``model.generate`` asks."""
        new = input_ids[:, max(self._prompt_tokens, input_ids.shape[1] - self._look_back) :]
        return torch.tensor([self.met(row) for row in new.tolist()], device=input_ids.device)

    def met(self, tokens: Sequence[int]) -> bool:
        """Return whether the last of these new tokens hold a stop sequence."""
        if not self._stop:
            return False
        text = self.tokenizer.decode(tokens[-self._look_back :])
        return any(stop in text for stop in self._stop)


class Said:
    """What the rows of a batch have said so far, whether they are still in the batch or not.

    Args:
        prompts: Index of each row's prompt, for messages.
        ends: Tokens that end a row.
        stops: Text that ends a row.

    Attributes:
        tokens: Of each row, its end included and nothing after it.
    """

    def __init__(self, prompts: Sequence[int], ends: Iterable[int], stops: StopSequences) -> None:
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self._prompts = prompts
        self._ends = frozenset(ends)
        self._stops = stops
        self._rows = list(range(len(prompts)))
        self._done: set[int] = set()

    @property
    def n_rows(self) -> int:
        """How many rows are in the batch."""
        return len(self._rows)

    def add(self, tokens: Sequence[int]) -> None:
        """Add a step's token to each row in the batch, unless the row is done.

        Raises:
            NonFiniteLogits: If a token could not be chosen.
        """
        for row, token in zip(self._rows, tokens, strict=True):
            if row in self._done:
                continue
            if token == NOT_FINITE:
                raise NonFiniteLogits(self._prompts[row])
            self.tokens[row].append(token)
            if token in self._ends or self._stops.met(self.tokens[row]):
                self._done.add(row)

    def left(self) -> list[int]:
        """Return the places in the batch of the rows that are not done."""
        return [place for place, row in enumerate(self._rows) if row not in self._done]

    def keep(self, places: Sequence[int]) -> None:
        """Let the rows at all other places leave the batch."""
        self._rows = [self._rows[place] for place in places]

"""Encoder-decoders as lm-eval sees them: the encoder reads a context, the decoder continues it.

Every continuation gets what it would get alone: contexts and continuations are padded on the
right, where masks and the decoder's order hide it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from searchmerge.errors import SpecError
from searchmerge.evaluators.causal.documents import Tokens
from searchmerge.evaluators.causal.fitting import Fitting
from searchmerge.evaluators.causal.generation import Generator
from searchmerge.evaluators.causal.model import device_of, sent
from searchmerge.evaluators.causal.tuning import Way

MODEL_CLASS = "AutoModelForSeq2SeqLM"
"""What transformers loads such a model as."""

_NOT_A_LABEL = -100
"""Stands in labels where there is no token; it becomes padding of the decoder's input."""

Pair = tuple[Tokens, Tokens]


class Seq2SeqBackend:
    """Runs a resident encoder-decoder of transformers.

    Args:
        batch_tokens: Tokens of one forward pass, padding included, 1 or more; a single pair may
            be longer. Where they do not fit into memory, fewer are run at once.
    """

    reads: Literal["seq2seq"] = "seq2seq"
    spare = 0

    def __init__(self, batch_tokens: int) -> None:
        self._batch_tokens = batch_tokens
        self._fitting = Fitting()
        self.generate = Generator(batch_tokens).generate

    def tune(
        self, model: nn.Module, score: Callable[[], object], *, may_grow: bool
    ) -> dict[Way, float]:
        """Return nothing: rows are never packed."""
        return {}

    def use(self, way: Way) -> None:
        """Do nothing: there is one way."""

    def follow(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Do nothing: the weights are those of the model that is run."""

    @torch.no_grad()
    def score(
        self, model: nn.Module, pairs: Sequence[Pair], max_length: int
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether it is the greedy one.

        Args:
            model: A model of transformers.
            pairs: Token ids of context and continuation, one or more of each.
            max_length: Tokens of a context that are read: its last.
        """

        def run(part: float) -> list[tuple[float, bool]]:
            results = [(0.0, False)] * len(pairs)
            for rows, batch in self._batches(pairs, max_length, part):
                values, is_greedy = _read(model, batch)
                told = zip(values.tolist(), is_greedy.tolist(), strict=True)
                for row, result in zip(rows, told, strict=True):
                    results[row] = result
            return results

        return self._fitting.run(run)

    def log_likelihoods(self, model: nn.Module, pairs: Sequence[Pair], max_length: int) -> Tensor:
        """Return each continuation's log-likelihood, ``(n_pairs,)`` float32, with its gradient."""
        order, values = [], []
        for rows, batch in self._batches(pairs, max_length, 1.0):
            order += rows
            values.append(_read(model, batch)[0])
        together = torch.cat(values)
        places = sorted(range(len(order)), key=order.__getitem__)
        return together[torch.tensor(places, device=together.device)]

    def _batches(
        self, pairs: Sequence[Pair], max_length: int, part: float
    ) -> Iterator[tuple[list[int], list[Pair]]]:
        """Yield which pairs are run together, those of about one length, and what they are."""
        cut = [(context[-max_length:], tokens) for context, tokens in pairs]
        order = sorted(range(len(cut)), key=lambda i: (-len(cut[i][0]), cut[i]))
        room = part * self._batch_tokens
        rows: list[int] = []
        width = 0  # of the longest context, which is the first, and the longest continuation
        for row in order:
            context, tokens = cut[row]
            wider = max(width, len(cut[rows[0]][0] if rows else context) + len(tokens))
            if rows and (len(rows) + 1) * wider > room:
                yield rows, [cut[i] for i in rows]
                rows, wider = [], len(context) + len(tokens)
            rows.append(row)
            width = wider
        if rows:
            yield rows, [cut[i] for i in rows]


def _read(model: Any, batch: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return each continuation's log-likelihood, and whether every token of it is the likeliest.

    A context is encoded once for all of its continuations.

    Raises:
        SpecError: If the model has no padding, which stands where a decoder reads no label.
    """
    from transformers.modeling_outputs import BaseModelOutput

    padding = getattr(model.config, "pad_token_id", None)
    if padding is None:
        raise SpecError(
            "the base's config.json has no pad_token_id, which its decoder reads; add it"
        )
    device = device_of(model)
    contexts = list(dict.fromkeys(context for context, _ in batch))
    tokens, mask = _padded(contexts, padding)
    encoded = model.get_encoder()(
        input_ids=sent(tokens, device), attention_mask=sent(mask, device), return_dict=True
    )
    places = {context: place for place, context in enumerate(contexts)}
    which = sent(torch.tensor([places[context] for context, _ in batch]), device)
    padded, is_token = _padded([tokens for _, tokens in batch], _NOT_A_LABEL)
    labels = sent(padded, device)
    logits = model(
        attention_mask=sent(mask, device)[which],
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded.last_hidden_state[which]),
        labels=labels,
        use_cache=False,
    ).logits
    is_read = sent(is_token, device).bool()
    wanted = labels.masked_fill(~is_read, 0)
    likely = logits.float().log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    is_greedy = ((logits.argmax(-1) == wanted) | ~is_read).all(-1)
    return likely.masked_fill(~is_read, 0).sum(-1), is_greedy


def _padded(rows: Sequence[Tokens], filler: int) -> tuple[Tensor, Tensor]:
    """Return rows padded on the right, and 1 where there is a token, ``(n_rows, longest)``."""
    tokens = torch.full((len(rows), max(map(len, rows))), filler)
    mask = torch.zeros_like(tokens)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return tokens, mask

"""Log-likelihoods of continuations under a causal language model, every context run once.

The rows of ``layout`` are run by public transformers API: a 4D ``attention_mask``,
``position_ids``, ``past_key_values`` and ``logits_to_keep``. A model that does not honour them
gets one row per continuation instead, found out once by scoring a few tokens both ways.
"""

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from searchmerge.evaluators.causal.documents import Document, Tokens, group_documents
from searchmerge.evaluators.causal.fitting import Fitting
from searchmerge.evaluators.causal.layout import Batch, lay_out_plain
from searchmerge.evaluators.causal.model import (
    Prefix,
    device_of,
    dtype_of,
    head_of,
    run_prefix,
    sent,
    takes,
)
from searchmerge.evaluators.causal.packing import PREFIX_COST, Cluster, plan_packed
from searchmerge.evaluators.causal.reading import Reading, read, read_with_gradient
from searchmerge.evaluators.causal.tuning import Way

_logger = logging.getLogger(__name__)

_KEPT_LAYOUTS = 1024
"""Calls whose layouts are kept: a study scores the same rounds of examples in every trial."""


_Layout = tuple[list[Cluster], list[int]]


class CausalScorer:
    """Scores continuations under whatever weights a model holds now.

    Args:
        batch_tokens: Tokens of one forward pass, padding included, 1 or more; a single sequence
            may be longer. Where they do not fit into memory, fewer are run at once.

    Attributes:
        way: How texts are run from now on.
    """

    def __init__(self, batch_tokens: int) -> None:
        self.way = Way()
        self._batch_tokens = batch_tokens
        self._fittings: defaultdict[Way, Fitting] = defaultdict(Fitting)
        self._packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self._lay_out = lru_cache(maxsize=_KEPT_LAYOUTS)(self._laid_out)
        self._calls: OrderedDict[tuple[Any, ...], tuple[Any, _Layout]] = OrderedDict()

    @torch.no_grad()
    def score(
        self, model: nn.Module, pairs: Sequence[tuple[Tokens, Tokens]], max_length: int
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding gives it.

        Args:
            model: A causal language model of transformers.
            pairs: Token ids of context and continuation, one or more of each.
            max_length: Tokens in the model's window; a longer pair is cut from the left.
        """
        if not pairs:
            return []
        window = self._packed_window(model, max_length) if self.way.packs else 0

        def run(part: float) -> list[tuple[float, bool]]:
            batch_tokens = max(1, int(part * self.way.growth * self._batch_tokens))
            how = max_length, window, batch_tokens, device_of(model)
            clusters, indices = self._layout(pairs, how)
            results = _run(model, clusters)
            return [results[index] for index in indices]

        return self._fittings[self.way].run(run)

    def log_likelihoods(
        self, model: nn.Module, pairs: Sequence[tuple[Tokens, Tokens]], max_length: int
    ) -> Tensor:
        """Return each continuation's log-likelihood, ``(n_pairs,)`` float32, with its gradient.

        All forward passes are kept until it is differentiated or let go of. A model that computes
        its activations again for the backward pass keeps no prefix: its rows are plain.

        Args:
            model: As for :meth:`score`.
            pairs: One or more; as there.
            max_length: As there.
        """
        keeps_prefixes = not getattr(model, "is_activation_checkpointing", False)
        window = self._packed_window(model, max_length) if keeps_prefixes else 0
        how = max_length, window, self._batch_tokens, device_of(model)
        clusters, indices = self._layout(pairs, how)
        values, owners = [], []
        for cluster in clusters:
            prefix = run_prefix(model, cluster.prefix)
            for batch in cluster.batches:
                values.append(read_with_gradient(_logits(model, batch, prefix), batch))
                owners.append(batch.owners)
        owner, value = torch.cat(owners), torch.cat(values)
        totals = value.new_zeros(int(owner.max()) + 1).index_add(0, owner.to(value.device), value)
        return totals[torch.tensor(indices, device=value.device)]

    def _packed_window(self, model: nn.Module, max_length: int) -> int:
        """Return within how many tokens rows may be packed; 0 where they may not."""
        return packed_window(model, max_length) if self._can_pack(model) else 0

    def _layout(
        self, pairs: Sequence[tuple[Tokens, Tokens]], how: tuple[int, int, int, torch.device]
    ) -> _Layout:
        """Return what ``_laid_out`` returns; pairs that are the same objects are not compared.

        To look at all tokens of long prompts takes a noticeable part of a round on a GPU.
        """
        key = (*map(id, pairs), *how)
        if key not in self._calls:
            kept = tuple(pairs)  # while they are kept, no others have their ids
            self._calls[key] = kept, self._lay_out(kept, *how)
            if len(self._calls) > _KEPT_LAYOUTS:
                self._calls.popitem(last=False)
        return self._calls[key][1]

    def _laid_out(
        self,
        pairs: tuple[tuple[Tokens, Tokens], ...],
        max_length: int,
        window: int,
        batch_tokens: int,
        device: torch.device,
    ) -> _Layout:
        """Return what to run, on its device for as long as it is kept, and each pair's place.

        Args:
            pairs: What to score.
            max_length: Tokens in the model's window.
            window: Tokens up to which rows may be packed; 0 where they may not.
            batch_tokens: Tokens of one forward pass.
            device: Where the model takes its inputs.

        Returns:
            What to run, and the place in the results of each pair.
        """
        documents, indices = group_documents(pairs, max_length)
        packed = [d for d in documents if _reach(d) <= window]
        plain = [d for d in documents if _reach(d) > window]
        cost = PREFIX_COST.get(device.type, PREFIX_COST["cpu"])
        clusters = plan_packed(packed, batch_tokens, window, cost=cost) if packed else []
        if plain:
            clusters.append(Cluster((), lay_out_plain(plain, batch_tokens)))
        return [cluster.on(device) for cluster in clusters], indices

    def _can_pack(self, model: nn.Module) -> bool:
        """Return whether packed rows give this model's own scores, found out once."""
        if model in self._packs:
            return self._packs[model]
        verdict = honours_packing(model)
        if verdict is not None:
            self._packs[model] = verdict
        if verdict is False:
            _logger.warning(
                "%s does not take packed rows: scoring one row per continuation, which gives the "
                "same scores and takes longer",
                type(model).__name__,
            )
        return bool(verdict)


def _reach(document: Document) -> int:
    """Return the length of a document's longest sequence."""
    return len(document.context) + max(map(len, document.continuations)) - 1


def packed_window(model: nn.Module, max_length: int) -> int:
    """Return within how many tokens every layer of the model attends to all that came before.

    A custom mask replaces that of a sliding window, so packed rows have to stay within it.
    """
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    limits = [max_length]
    if getattr(config, "use_sliding_window", True):
        limits.append(getattr(config, "sliding_window", None) or max_length)
    limits.append(getattr(config, "attention_chunk_size", None) or max_length)
    return min(limits)


def _run(model: nn.Module, clusters: Iterable[Cluster]) -> list[tuple[float, bool]]:
    """Return log-likelihood and greediness by owner; all owners occur in ``clusters``.

    Nothing waits for a GPU before all of its work is under way.
    """
    reads: list[Reading] = []
    owners: list[np.ndarray] = []
    for cluster in clusters:
        prefix = run_prefix(model, cluster.prefix)
        for batch in cluster.batches:
            reads.append(read(_logits(model, batch, prefix), batch))
            owners.append(batch.owners.numpy())
    owner = np.concatenate(owners)
    both = [torch.stack([reading.values, reading.greedy.float()]) for reading in reads]
    values, greedy = torch.cat(both, 1).cpu().numpy()  # the only wait
    totals, misses = np.bincount(owner, values), np.bincount(owner, greedy == 0)
    return list(zip(totals.tolist(), (misses == 0).tolist(), strict=True))


def _logits(model: nn.Module, batch: Batch, prefix: Prefix) -> Tensor:
    """Return the logits that a batch keeps, ``(n_kept, vocabulary)``; no others are computed."""
    device = device_of(model)
    inputs: dict[str, Any] = {"input_ids": sent(batch.tokens, device), "use_cache": False}
    if batch.layout is not None:
        positions, orders, ends = sent(batch.layout, device)
        inputs["attention_mask"] = _mask(orders, ends, prefix.n_tokens, dtype_of(model))
        inputs["position_ids"] = positions
    if prefix.n_tokens:
        inputs |= {"past_key_values": prefix.rows(len(batch.tokens)), "use_cache": True}
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = batch.n_keep
    with head_of(model, (len(batch.tokens), batch.n_keep), batch.kept) as was_used:
        logits: Tensor = model(**inputs).logits
    if was_used():
        return logits[0]
    return logits[:, -batch.n_keep :].flatten(0, 1)[sent(batch.kept, logits.device)]


def _mask(orders: Tensor, ends: Tensor, past: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask of packed rows, ``(n_rows, 1, n_tokens, past + n_tokens)``.

    A token sees the prefix, itself, and the tokens that it stands in a branch of.
    """
    n_rows, n_tokens = orders.shape
    hidden = orders[:, :, None] < orders[:, None]
    hidden |= orders[:, :, None] >= ends[:, None]
    mask = torch.zeros(n_rows, n_tokens, past + n_tokens, dtype=dtype, device=hidden.device)
    mask[:, :, past:].masked_fill_(hidden, torch.finfo(dtype).min)
    return mask[:, None]


# --- The canary: does this model honour packed rows? -----------------------------------------

_REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError, LookupError, AttributeError)
"""What the forward pass of a model that does not know the arguments of packed rows raises."""


@torch.no_grad()
def honours_packing(model: nn.Module) -> bool | None:
    """Return whether packed rows score what plain rows score; ``None`` if these weights hide it.

    A few tokens are scored both ways, and a third time in packed rows whose mask is plainly
    causal: only weights for which the mask matters can tell a model that honours it from one
    that does not. Weights that give no finite logits, or the same ones whatever came before,
    say nothing about the next weights.
    """
    if not all(takes(model, name) for name in ("attention_mask", "position_ids")):
        return False
    documents = _canary_documents(model)
    plain = _likelihoods(model, [Cluster((), lay_out_plain(documents, 64))])
    plan = plan_packed(documents, 64, 64, cost=0, row_tokens=12)
    try:
        packed = _likelihoods(model, plan)
        for batch in plan[0].batches:
            if batch.layout is not None:
                batch.layout[1] = torch.arange(batch.tokens.shape[1])
                batch.layout[2] = batch.tokens.shape[1]
        causal = _likelihoods(model, plan)
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as refusal:
        _logger.debug("packed rows refused: %s", refusal)
        return False
    # Rounding changes a log-likelihood by some units in its last place.
    relative = max(2 * torch.finfo(dtype_of(model)).eps, 1e-5)
    noise = relative * plain.abs().mean()
    effect = (causal - plain).abs().mean()
    if not torch.isfinite(plain).all() or not effect > 2 * noise:
        return None
    return bool((packed - plain).abs().mean() <= noise)


def _canary_documents(model: nn.Module) -> list[Document]:
    """Return documents that share a prefix, for two packed rows of different lengths."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = tuple(7 * i % embeddings.num_embeddings for i in range(1, 25))
    prefix = ids[:4]
    return [
        Document((*prefix, ids[4], ids[5]), (ids[6:9], ids[9:11]), (0, 1)),
        Document((*prefix, ids[11]), (ids[12:15], ids[15:19]), (2, 3)),
        Document((*prefix, ids[19]), (ids[20:23], ids[21:23]), (4, 5)),
    ]


def _likelihoods(model: nn.Module, clusters: Iterable[Cluster]) -> Tensor:
    return torch.tensor([value for value, _ in _run(model, clusters)])

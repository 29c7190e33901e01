"""Log-likelihoods of continuations under a causal language model, every context run once.

A document is a context and the continuations that are compared in it. Its tokens are laid out
once, the context and then every continuation, and a mask lets a continuation see the context
and itself only; its positions go on from the end of the context. Several documents fill one such
row, and a prefix that many documents share is run once, as a key-value cache. All of it is
public transformers API: a 4D ``attention_mask``, ``position_ids``, ``past_key_values`` and
``logits_to_keep``. A model that does not honour them gets one row per continuation instead.
"""

import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

Tokens = tuple[int, ...]

_PREFIX_COST = 64
"""What one more forward pass costs, in tokens: a shared prefix has to save more than this."""

_PLAIN_FROM = 128
"""Tokens from which a document with one continuation is better off without a mask."""

_LOGIT_ROWS = 32
"""Rows of logits that are reduced at a time, so that no second copy of all of them is made."""


@dataclass(frozen=True)
class Document:
    """A context, and the distinct continuations to score in it.

    Attributes:
        context: Token ids, one or more.
        continuations: Token ids of each continuation, one or more.
        owners: For each continuation, its index in the result.
    """

    context: Tokens
    continuations: tuple[Tokens, ...]
    owners: tuple[int, ...]

    def size(self, prefix: int = 0) -> int:
        """Return how many tokens a row needs for it after the first ``prefix`` ones."""
        return len(self.context) - prefix + sum(len(tokens) - 1 for tokens in self.continuations)


@dataclass
class Batch:
    """One forward pass, and which of its logits are read.

    Attributes:
        tokens: Token ids, ``(n_rows, n_tokens)``, int64.
        keep: Columns whose logits are computed, ``(n_keep,)``, int64, ascending.
        at: For each token read, its place in the kept logits of all rows one after another.
        targets: For each token read, its id.
        owners: For each token read, the index of its continuation.
        layout: Position, document and branch (0 is the context) of every token of a packed row,
            ``(3, n_tokens)``; ``None`` for plain rows, one sequence each, padded on the right.
    """

    tokens: Tensor
    keep: Tensor
    at: Tensor
    targets: Tensor
    owners: Tensor
    layout: Tensor | None = None


@dataclass
class Cluster:
    """Batches that go on from the same prefix, which may be empty."""

    prefix: Tokens
    batches: list[Batch]


@dataclass
class _Reads:
    """The tokens to read from a batch, collected while its rows are laid out."""

    columns: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    def add(self, row: int, columns: Sequence[int], targets: Tokens, owner: int) -> None:
        self.columns += columns
        self.rows += [row] * len(targets)
        self.targets += targets
        self.owners += [owner] * len(targets)

    def batch(self, tokens: Tensor, layout: Tensor | None = None) -> Batch:
        keep, at = torch.unique(torch.tensor(self.columns), return_inverse=True)
        at = at + torch.tensor(self.rows) * len(keep)
        targets, owners = torch.tensor(self.targets), torch.tensor(self.owners)
        return Batch(tokens, keep, at, targets, owners, layout)


# --- Planning: what to run, from the tokens alone --------------------------------------------


def group_documents(
    pairs: Iterable[tuple[Tokens, Tokens]], max_length: int
) -> tuple[list[Document], list[int]]:
    """Return the documents of ``(context, continuation)`` pairs, and each pair's result index.

    A pair that is longer than the window loses tokens from the left, as in lm-eval's ``HFLM``:
    the last ``max_length + 1`` tokens stay, of which the last is predicted only.
    """
    grouped: dict[Tokens, dict[Tokens, int]] = {}
    indices = []
    count = 0
    for context, continuation in pairs:
        excess = len(context) + len(continuation) - (max_length + 1)
        known = grouped.setdefault(context[excess:] if excess > 0 else context, {})
        if continuation not in known:
            known[continuation] = count
            count += 1
        indices.append(known[continuation])
    documents = [Document(c, tuple(known), tuple(known.values())) for c, known in grouped.items()]
    return documents, indices


def share_prefixes(
    documents: Sequence[Document], cost: int = _PREFIX_COST
) -> list[tuple[int, list[Document]]]:
    """Divide documents into clusters by the prefix that it pays to run once.

    Every document keeps a token of its context for itself, from which its continuations follow.

    Args:
        documents: In any order.
        cost: Tokens that running a prefix costs beyond its own.

    Returns:
        For each cluster its prefix's length and its documents; the cluster without a prefix,
        if any, is the first.
    """
    alone, clusters = [], []
    ordered = sorted(documents, key=lambda document: document.context[:-1])
    for prefix, members in _divide(ordered, 0, cost)[1]:
        if prefix:
            clusters.append((prefix, members))
        else:
            alone += members
    return ([(0, alone)] if alone else []) + clusters


def _divide(
    documents: Sequence[Document], depth: int, cost: int
) -> tuple[int, list[tuple[int, list[Document]]]]:
    """Divide ordered documents that share ``depth`` tokens; return the tokens saved, and how."""
    longest = max(len(document.context) for document in documents) - 1
    if (len(documents) - 1) * longest <= cost:
        return 0, [(0, list(documents))]
    shared = _shared_length(documents[0].context, documents[-1].context, depth)
    saved = (len(documents) - 1) * shared - cost
    whole = [(shared, list(documents))] if saved > 0 else [(0, list(documents))]
    runs = list(_runs(documents, shared))
    parts = [_divide(run, shared, cost) for run in runs] if len(runs) > 1 else []
    apart = sum(part_saved for part_saved, _ in parts)
    if apart > max(saved, 0):
        return apart, [cluster for _, clusters in parts for cluster in clusters]
    return max(saved, 0), whole


def _shared_length(first: Tokens, last: Tokens, depth: int) -> int:
    """Return how many tokens two contexts share, the last of either left out."""
    limit = min(len(first), len(last)) - 1
    return next((i for i in range(depth, limit) if first[i] != last[i]), limit)


def _runs(documents: Sequence[Document], column: int) -> Iterator[Sequence[Document]]:
    """Cut ordered documents where the token at ``column`` changes, or contexts end before it."""
    keys = [d.context[column] if column < len(d.context) - 1 else None for d in documents]
    cuts = [i for i in range(1, len(keys)) if keys[i] != keys[i - 1]]
    for start, stop in pairwise([0, *cuts, len(keys)]):
        yield documents[start:stop]


def pack(documents: Sequence[Document], prefix: int, capacity: int) -> list[list[Document]]:
    """Distribute documents over rows of ``capacity`` tokens: the longest first, first fit.

    A document that is longer than a row has its continuations spread over several; one
    continuation is never cut, so that a row may be longer than ``capacity``.
    """
    pieces = [piece for document in documents for piece in _pieces(document, prefix, capacity)]
    pieces.sort(key=lambda piece: piece.size(prefix), reverse=True)
    rows: list[list[Document]] = []
    room: list[int] = []
    for piece in pieces:
        size = piece.size(prefix)
        fits = next((i for i, left in enumerate(room) if size <= left), None)
        if fits is None:
            rows.append([piece])
            room.append(capacity - size)
        else:
            rows[fits].append(piece)
            room[fits] -= size
    return rows


def _pieces(document: Document, prefix: int, capacity: int) -> Iterator[Document]:
    """Divide a document's continuations, so that each part fits into a row where it can."""
    if document.size(prefix) <= capacity:
        yield document
        return
    start, size = 0, len(document.context) - prefix
    for stop, tokens in enumerate(document.continuations):
        if stop > start and size + len(tokens) - 1 > capacity:
            yield Document(
                document.context, document.continuations[start:stop], document.owners[start:stop]
            )
            start, size = stop, len(document.context) - prefix
        size += len(tokens) - 1
    yield Document(document.context, document.continuations[start:], document.owners[start:])


def lay_out_row(documents: Sequence[Document], prefix: int) -> Batch:
    """Return the batch of one packed row: each document's context, then its continuations."""
    tokens: list[int] = []
    layout: tuple[list[int], list[int], list[int]] = ([], [], [])

    def append(part: Tokens, position: int, document: int, branch: int) -> None:
        tokens.extend(part)
        layout[0].extend(range(position, position + len(part)))
        layout[1].extend([document] * len(part))
        layout[2].extend([branch] * len(part))

    reads = _Reads()
    for number, document in enumerate(documents):
        append(document.context[prefix:], prefix, number, 0)
        last = len(tokens) - 1
        branches = zip(document.continuations, document.owners, strict=True)
        for branch, (continuation, owner) in enumerate(branches, start=1):
            start = len(tokens)
            append(continuation[:-1], len(document.context), number, branch)
            reads.add(0, [last, *range(start, len(tokens))], continuation, owner)
    return reads.batch(torch.tensor([tokens]), torch.tensor(layout))


def lay_out_plain(documents: Sequence[Document], batch_tokens: int) -> list[Batch]:
    """Return batches of one row per continuation, the longest first, padded on the right.

    Continuations that differ in their last token only, which is predicted and never read, share
    a row.
    """
    inputs: dict[Tokens, list[tuple[Tokens, int]]] = {}
    for document in documents:
        for continuation, owner in zip(document.continuations, document.owners, strict=True):
            row = document.context + continuation[:-1]
            inputs.setdefault(row, []).append((continuation, owner))
    rows = sorted(inputs.items(), key=lambda item: len(item[0]), reverse=True)
    batches, start = [], 0
    while start < len(rows):
        stop = start + max(1, batch_tokens // len(rows[start][0]))
        batches.append(_plain_batch(rows[start:stop]))
        start = stop
    return batches


def _plain_batch(rows: Sequence[tuple[Tokens, list[tuple[Tokens, int]]]]) -> Batch:
    tokens = torch.zeros(len(rows), len(rows[0][0]), dtype=torch.int64)
    reads = _Reads()
    for number, (row, continuations) in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
        for continuation, owner in continuations:
            reads.add(number, range(len(row) - len(continuation), len(row)), continuation, owner)
    return reads.batch(tokens)


def plan_packed(
    documents: Sequence[Document], batch_tokens: int, max_length: int, cost: int = _PREFIX_COST
) -> list[Cluster]:
    """Return the forward passes that score documents in packed rows.

    Args:
        documents: What to score.
        batch_tokens: Tokens in a row, 1 or more.
        max_length: The model's window in tokens; a row and its prefix stay within it.
        cost: Tokens that running a prefix costs beyond its own.
    """
    limit = min(batch_tokens, max_length)
    clusters = []
    for prefix, members in share_prefixes(documents, cost):
        kinds: dict[str, list[Document]] = {"plain": [], "long": [], "packed": []}
        for document in members:
            kinds["packed" if prefix else _kind(document, limit)].append(document)
        if kinds["plain"]:
            clusters.append(Cluster((), lay_out_plain(kinds["plain"], batch_tokens)))
        clusters += [
            _cluster([document], len(document.context) - 1, limit, max_length)
            for document in kinds["long"]
        ]
        if kinds["packed"]:
            clusters.append(_cluster(kinds["packed"], prefix, limit, max_length))
    return clusters


def _kind(document: Document, limit: int) -> str:
    """Return how a document without a shared prefix is best run."""
    if len(document.continuations) == 1 and document.size() >= _PLAIN_FROM:
        return "plain"
    return "long" if document.size() > limit else "packed"


def _cluster(
    documents: Sequence[Document], prefix: int, capacity: int, max_length: int
) -> Cluster:
    rows = pack(documents, prefix, min(capacity, max_length - prefix))
    batches = [lay_out_row(row, prefix) for row in rows]
    return Cluster(documents[0].context[:prefix], batches)


# --- Running: the forward passes of a plan ---------------------------------------------------


class CausalScorer:
    """Scores continuations under whatever weights a model holds now.

    Args:
        batch_tokens: Tokens of one forward pass, padding included, 1 or more; a single sequence
            may be longer.
    """

    def __init__(self, batch_tokens: int) -> None:
        self._batch_tokens = batch_tokens
        self._packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

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
        documents, indices = group_documents(pairs, max_length)
        packed, plain = documents, []
        window = packed_window(model, max_length)
        if self._can_pack(model):
            packed = [d for d in documents if _reach(d) <= window]
            plain = [d for d in documents if _reach(d) > window]
        else:
            packed, plain = [], documents
        clusters = plan_packed(packed, self._batch_tokens, window) if packed else []
        if plain:
            clusters.append(Cluster((), lay_out_plain(plain, self._batch_tokens)))
        results = _run(model, clusters)
        return [results[index] for index in indices]

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
    """Return log-likelihood and greediness by owner; all owners occur in ``clusters``."""
    reads: list[tuple[Tensor, Tensor]] = []
    owners: list[Tensor] = []
    for cluster in clusters:
        cache = _prefix_cache(model, cluster.prefix) if cluster.prefix else None
        for batch in cluster.batches:
            reads.append(_read(_logits(model, batch, cache), batch))
            owners.append(batch.owners)
            if cache is not None:
                cache.crop(-batch.tokens.shape[1])  # a negative length is what to take away
    owner = torch.cat(owners)
    values = torch.cat([read[0] for read in reads]).cpu().double()
    missed = ~torch.cat([read[1] for read in reads]).cpu()
    totals = torch.bincount(owner, values)
    misses = torch.bincount(owner, missed.double())
    return list(zip(totals.tolist(), (misses == 0).tolist(), strict=True))


def _prefix_cache(model: nn.Module, prefix: Tokens) -> Any:
    """Return the key-value cache of a prefix, for rows that go on from it."""
    from transformers import DynamicCache

    cache = DynamicCache()
    tokens = torch.tensor([prefix], device=_device(model))
    model(input_ids=tokens, past_key_values=cache, use_cache=True, **_keep_last(model))
    return cache


def _logits(model: nn.Module, batch: Batch, cache: Any) -> Tensor:
    """Return the kept logits of a batch's rows, one after another, ``(n, vocabulary)``."""
    device = _device(model)
    keep = batch.keep.to(device)
    inputs: dict[str, Any] = {"input_ids": batch.tokens.to(device), "use_cache": False}
    if batch.layout is not None:
        layout = batch.layout.to(device)
        past = 0 if cache is None else cache.get_seq_length()
        dtype = next(model.parameters()).dtype
        inputs["attention_mask"] = _mask(layout[1], layout[2], past, dtype)
        inputs["position_ids"] = layout[:1]
    if cache is not None:
        inputs |= {"past_key_values": cache, "use_cache": True}
    if _takes(model, "logits_to_keep"):
        logits: Tensor = model(**inputs, logits_to_keep=keep).logits
    else:
        logits = model(**inputs).logits[:, keep]
    return logits.flatten(0, 1)


def _mask(documents: Tensor, branches: Tensor, past: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask of a packed row, ``(1, 1, n_tokens, past + n_tokens)``.

    A token sees the prefix, its own document's context and its own branch, up to itself.
    """
    seen = documents[:, None] == documents
    seen &= (branches == 0) | (branches[:, None] == branches)
    seen.tril_()
    mask = torch.zeros(len(documents), past + len(documents), dtype=dtype, device=seen.device)
    mask[:, past:].masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[None, None]


def _read(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every token read, float32, and whether it is the largest."""
    at, targets = batch.at.to(logits.device), batch.targets.to(logits.device)
    total = torch.cat([rows.float().logsumexp(-1) for rows in torch.split(logits, _LOGIT_ROWS)])
    chosen = logits[at, targets]
    greedy = chosen == logits.amax(-1)[at]
    # Of equal logits the first is the greedy one; few are left to look at.
    greedy[greedy.clone()] = logits[at[greedy]].argmax(-1) == targets[greedy]
    return chosen.float() - total[at], greedy


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _keep_last(model: nn.Module) -> dict[str, int]:
    return {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# --- The canary: does this model honour packed rows? -----------------------------------------

_NOISE = {torch.float16: 2e-2, torch.bfloat16: 1.2e-1}
"""Mean difference in a continuation's log-likelihood that rounding may make; else 2e-4."""

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
    if not all(_takes(model, name) for name in ("attention_mask", "position_ids")):
        return False
    documents = _canary_documents(model)
    plain = _likelihoods(model, [Cluster((), lay_out_plain(documents, 64))])
    plan = plan_packed(documents, 64, 64, cost=0)
    try:
        packed = _likelihoods(model, plan)
        for batch in plan[0].batches:
            if batch.layout is not None:
                batch.layout[1:] = 0  # one document, one branch; the positions stay
        causal = _likelihoods(model, plan)
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as refusal:
        _logger.debug("packed rows refused: %s", refusal)
        return False
    noise = _NOISE.get(next(model.parameters()).dtype, 2e-4)
    effect = (causal - plain).abs().mean()
    if not torch.isfinite(plain).all() or not effect > 4 * noise:
        return None
    return bool((packed - plain).abs().mean() <= noise)


def _canary_documents(model: nn.Module) -> list[Document]:
    """Return two documents that share a prefix and have several continuations each."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = [7 * i % embeddings.num_embeddings for i in range(1, 20)]
    prefix, rest = tuple(ids[:4]), ids[4:]
    return [
        Document((*prefix, rest[0], rest[1]), (tuple(rest[2:5]), tuple(rest[5:7])), (0, 1)),
        Document((*prefix, rest[7]), (tuple(rest[8:11]), tuple(rest[11:15])), (2, 3)),
    ]


def _likelihoods(model: nn.Module, clusters: Iterable[Cluster]) -> Tensor:
    return torch.tensor([value for value, _ in _run(model, clusters)])

"""Which documents a causal language model runs together: what to run, from tokens alone.

Documents are divided by what their contexts begin with, and spread over packed rows (see
``layout``). A prefix that many documents share is run once for each row; or, where that takes
longer than one more forward pass, left out of the rows and run once before them.

What runs how is decided by the tokens and the kind of device alone, unless a study's first worker
measures that rows of one text each are faster (see ``tuning``). A mask rules out some kernels: on
an H100 attention with one took 7.5 % of a 1B model's time in packed rows of 128 tokens and 18 % in
rows of 2,048, while a context that is run anew for each of four choices triples the time. Texts
that share nothing gain nothing by packing, and are run without a mask.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from searchmerge.evaluators.causal.documents import Document, Tokens, branches
from searchmerge.evaluators.causal.layout import Batch, cut, lay_out_packed, lay_out_plain

PREFIX_COST = {"cpu": 64, "cuda": 2048}
"""What one more forward pass costs, in tokens, by kind of device: to run a shared prefix before
the rows has to save more than this. On a GPU it costs the launches of its kernels."""

ROW_TOKENS = 128
"""Tokens of a packed row, more or less. Attention grows with the row, so rows are short."""

_PLAIN_FROM = 128
"""Tokens, on average, from which continuations are better off in rows of their own, without a
mask, provided that they share next to nothing."""

_PLAIN_FACTOR = 1.05
"""What continuations may take in rows of their own, in terms of what they take when packed."""


@dataclass(frozen=True)
class Cluster:
    """Batches that go on from the same prefix, which may be empty."""

    prefix: Tokens
    batches: list[Batch]

    def on(self, device: torch.device) -> "Cluster":
        """Return it with what its passes need on a device."""
        return Cluster(self.prefix, [batch.on(device) for batch in self.batches])


def share_prefixes(
    documents: Sequence[Document], cost: int = PREFIX_COST["cpu"]
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


def fill_rows(
    documents: Sequence[Document], prefix: int, row_tokens: int, limit: int
) -> list[list[Document]]:
    """Distribute documents over rows of about ``row_tokens`` tokens, all of about one length.

    A document that is longer than ``limit`` has its continuations spread over several rows; one
    continuation is never cut.

    Args:
        documents: What to distribute.
        prefix: Tokens of every context that are left out.
        row_tokens: Tokens of a row, 1 or more, unless a document is longer.
        limit: Tokens that a row never exceeds, unless a single continuation does.
    """
    pieces = [piece for document in documents for piece in _pieces(document, prefix, limit)]
    pieces.sort(key=lambda piece: piece.size(prefix), reverse=True)
    total = sum(piece.size(prefix) for piece in pieces)
    n_rows = max(1, round(total / min(row_tokens, limit)))
    filling = [(0, i) for i in range(n_rows)]
    rows: list[list[Document]] = [[] for _ in filling]
    for piece in pieces:
        size = piece.size(prefix)
        filled, row = filling[0]
        if filled and filled + size > limit:
            rows.append([piece])
            heapq.heappush(filling, (size, len(rows) - 1))
        else:
            rows[row].append(piece)
            heapq.heapreplace(filling, (filled + size, row))
    return [row for row in rows if row]


def _pieces(document: Document, prefix: int, limit: int) -> Iterator[Document]:
    """Divide a document's continuations, so that each part fits into ``limit`` where it can."""
    context = len(document.context) - prefix
    piece: dict[Tokens, int] = {}
    size = context
    for tokens, owner, n_shared in branches(document):
        if piece and size + len(tokens) - 1 - n_shared > limit:
            yield Document(document.context, tuple(piece), tuple(piece.values()))
            piece, size, n_shared = {}, context, 0
        piece[tokens] = owner
        size += len(tokens) - 1 - n_shared
    yield Document(document.context, tuple(piece), tuple(piece.values()))


def plan_packed(
    documents: Sequence[Document],
    batch_tokens: int,
    max_length: int,
    *,
    cost: int = PREFIX_COST["cpu"],
    row_tokens: int = ROW_TOKENS,
) -> list[Cluster]:
    """Return the forward passes that score documents in packed rows.

    Args:
        documents: What to score.
        batch_tokens: Tokens of a forward pass, 1 or more; a longer document gets its own.
        max_length: The model's window in tokens; a row and its prefix stay within it.
        cost: Tokens that running a prefix costs beyond its own.
        row_tokens: Tokens of a row, more or less.
    """
    budget = _Budget(batch_tokens, max_length, row_tokens, cost)
    clusters = []
    for prefix, members in share_prefixes(documents, cost):
        kinds: dict[str, list[Document]] = {"plain": [], "long": [], "packed": []}
        for document in members:
            kinds["packed" if prefix else budget.kind(document)].append(document)
        if kinds["plain"]:
            clusters.append(Cluster((), lay_out_plain(kinds["plain"], batch_tokens)))
        clusters += [budget.cluster([d], len(d.context) - 1) for d in kinds["long"]]
        if kinds["packed"]:
            clusters.append(budget.cluster(kinds["packed"], prefix))
    return clusters


@dataclass(frozen=True)
class _Budget:
    """How many tokens a batch, a sequence and a row may have, and what a forward pass costs."""

    batch_tokens: int
    max_length: int
    row_tokens: int
    cost: int

    def kind(self, document: Document) -> str:
        """Return how a document without a shared prefix is best run."""
        n_rows, size = len(document.continuations), document.size()
        apart = sum(len(document.context) + len(c) - 1 for c in document.continuations)
        if size >= _PLAIN_FROM * n_rows and apart <= _PLAIN_FACTOR * size:
            return "plain"
        return "long" if size > min(self.batch_tokens, self.max_length) else "packed"

    def cluster(self, documents: Sequence[Document], prefix: int) -> Cluster:
        """Return the batches of packed rows for documents that share a prefix."""
        limit = min(self.batch_tokens, self.max_length - prefix)
        rows = fill_rows(documents, prefix, self.row_tokens, limit)
        sizes = [sum(document.size(prefix) for document in row) for row in rows]
        longest = max(sizes) + prefix
        inside = (len(rows) - 1) * prefix <= self.cost and longest <= self.batch_tokens
        if inside:
            sizes = [size + prefix for size in sizes]
        reads = [sum(1 + document.n_tails for document in row) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -sizes[i])
        batches = [
            lay_out_packed([rows[i] for i in order[places]], prefix, inside=inside)
            for places in cut([(sizes[i], reads[i]) for i in order], self.batch_tokens)
        ]
        return Cluster(() if inside else documents[0].context[:prefix], batches)

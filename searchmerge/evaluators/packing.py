"""How continuations are laid out for a causal language model: what to run, from tokens alone.

A packed row holds several documents. First the contexts, each but for its last token; then, up
to the right end of the row, every context's last token and its continuations, whose last tokens
are predicted and never read. A mask lets a token see only what stands before it in its own text,
and positions count from the document's start. So the logits that are wanted are those of the last
columns, a context is run once for all of its continuations, and so is what several continuations
begin with. A prefix that many documents share is run once for each row; or, where that takes
longer than one more forward pass, left out of the rows and run once before them.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

Tokens = tuple[int, ...]

PREFIX_COST = 64
"""What one more forward pass costs, in tokens: a shared prefix has to save more than this."""

ROW_TOKENS = 128
"""Tokens of a packed row, more or less. Attention grows with the row, so rows are short."""

_PLAIN_FROM = 128
"""Tokens from which a document with one continuation is better off without a mask."""


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
        return len(self.context) - prefix + self.n_tails

    @cached_property
    def n_tails(self) -> int:
        """How many tokens of the continuations are run."""
        return sum(len(tokens) - 1 - n_shared for tokens, _, n_shared in branches(self))


@dataclass(frozen=True)
class Batch:
    """One forward pass, and which of its logits are read.

    The order of a token counts the tokens of its row, document by document, each a tree whose
    branches follow one another. A token stands before those of the orders from its own up to its
    end, which is not one of them, and before no others.

    Attributes:
        tokens: Token ids, ``(n_rows, n_tokens)``, int64.
        n_keep: How many of the last columns have their logits computed.
        at: For each token read, its place in the kept logits of all rows one after another.
        targets: For each token read, its id.
        owners: For each token read, the index of its continuation.
        layout: Position, order and end of every token of packed rows, padded on the left (order
            -1, end 0), ``(3, n_rows, n_tokens)``; ``None`` for plain rows, one sequence each,
            padded on the right.
    """

    tokens: Tensor
    n_keep: int
    at: Tensor
    targets: Tensor
    owners: Tensor
    layout: Tensor | None = None


@dataclass(frozen=True)
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

    def add(self, row: int, columns: Iterable[int], targets: Tokens, owner: int) -> None:
        self.columns += columns
        self.rows += [row] * len(targets)
        self.targets += targets
        self.owners += [owner] * len(targets)

    def batch(self, tokens: Tensor, layout: Tensor | None = None) -> Batch:
        first = min(self.columns)
        n_keep = tokens.shape[1] - first
        at = torch.tensor(self.columns) - first + torch.tensor(self.rows) * n_keep
        targets, owners = torch.tensor(self.targets), torch.tensor(self.owners)
        return Batch(tokens, n_keep, at, targets, owners, layout)


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


def branches(document: Document) -> list[tuple[Tokens, int, int]]:
    """Return a document's continuations in the order in which they are laid out.

    Returns:
        For each continuation its tokens, its owner, and how many of its first tokens have been
        run for those before it.
    """
    found, path = [], 0
    previous: Tokens = ()
    ordered = sorted(zip(document.continuations, document.owners, strict=True))
    for tokens, owner in ordered:
        limit = min(path, len(tokens) - 1)
        n_shared = next((i for i in range(limit) if tokens[i] != previous[i]), limit)
        found.append((tokens, owner, n_shared))
        previous, path = tokens, len(tokens) - 1
    return found


def share_prefixes(
    documents: Sequence[Document], cost: int = PREFIX_COST
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


@dataclass
class _Part:
    """Tokens of a row and what the model is told of them."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    orders: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def add(self, tokens: Tokens, position: int, order: int, end: int) -> None:
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        self.orders += range(order, order + len(tokens))
        self.ends += [end] * len(tokens)


def lay_out_packed(rows: Sequence[Sequence[Document]], prefix: int, *, inside: bool) -> Batch:
    """Return the batch of packed rows.

    Args:
        rows: The documents of each row.
        prefix: Tokens of every context that are the same.
        inside: Whether each row begins with them; else they were run before.
    """
    shared = rows[0][0].context[: prefix if inside else 0]
    sizes = [len(shared) + sum(document.size(prefix) for document in row) for row in rows]
    width = max(sizes)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    layout = torch.zeros(3, len(rows), width, dtype=torch.int64)
    layout[1] = -1
    reads = _Reads()
    for number, row in enumerate(rows):
        contexts, tails = _Part(), _Part()
        contexts.add(shared, 0, 0, sizes[number])
        end = width - sum(1 + document.n_tails for document in row)
        for document in row:
            _lay_out_document(document, prefix, (contexts, tails), (reads, number, end))
        start = end - len(contexts.tokens)
        tokens[number, start:] = torch.tensor(contexts.tokens + tails.tokens)
        layout[0, number, start:] = torch.tensor(contexts.positions + tails.positions)
        layout[1, number, start:] = torch.tensor(contexts.orders + tails.orders)
        layout[2, number, start:] = torch.tensor(contexts.ends + tails.ends)
    return reads.batch(tokens, layout)


def _lay_out_document(
    document: Document,
    prefix: int,
    parts: tuple[_Part, _Part],
    reading: tuple[_Reads, int, int],
) -> None:
    """Add a document to its row's contexts and tails, and what is read to the batch's reads."""
    (contexts, tails), (reads, row, first) = parts, reading
    length, order = len(document.context), len(contexts.tokens) + len(tails.tokens)
    end = order + document.size(prefix)
    contexts.add(document.context[prefix:-1], prefix, order, end)
    path = [len(tails.tokens)]  # places in the tails of the tokens that the next one follows
    tails.add(document.context[-1:], length - 1, order + length - prefix - 1, end)
    for continuation, owner, n_shared in branches(document):
        here = len(contexts.tokens) + len(tails.tokens)
        for place in path[1 + n_shared :]:  # the branch that they are in ends here
            tails.ends[place] = here
        del path[1 + n_shared :]
        new = continuation[n_shared:-1]
        path += range(len(tails.tokens), len(tails.tokens) + len(new))
        tails.add(new, length + n_shared, here, end)
        reads.add(row, (first + place for place in path), continuation, owner)


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
    documents: Sequence[Document],
    batch_tokens: int,
    max_length: int,
    *,
    cost: int = PREFIX_COST,
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
        if len(document.continuations) == 1 and document.size() >= _PLAIN_FROM:
            return "plain"
        return "long" if document.size() > min(self.batch_tokens, self.max_length) else "packed"

    def cluster(self, documents: Sequence[Document], prefix: int) -> Cluster:
        """Return the batches of packed rows for documents that share a prefix."""
        limit = min(self.batch_tokens, self.max_length - prefix)
        rows = fill_rows(documents, prefix, self.row_tokens, limit)
        sizes = [sum(document.size(prefix) for document in row) for row in rows]
        longest = max(sizes) + prefix
        inside = (len(rows) - 1) * prefix <= self.cost and longest <= self.batch_tokens
        if inside:
            sizes = [size + prefix for size in sizes]
        order = sorted(range(len(rows)), key=lambda i: -sizes[i])
        batches, start = [], 0
        while start < len(order):
            stop = start + max(1, self.batch_tokens // sizes[order[start]])
            chosen = [rows[i] for i in order[start:stop]]
            batches.append(lay_out_packed(chosen, prefix, inside=inside))
            start = stop
        return Cluster(() if inside else documents[0].context[:prefix], batches)

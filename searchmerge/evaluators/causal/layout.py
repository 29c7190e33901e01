"""How documents are laid out in the rows of one forward pass, and where their tokens are read.

A packed row holds several documents. First the contexts, each but for its last token; then, up
to the right end of the row, every context's last token and its continuations, whose last tokens
are predicted and never read. A mask lets a token see only what stands before it in its own text,
and positions count from the document's start. So the logits that are wanted are those of the last
columns, a context is run once for all of its continuations, and so is what several continuations
begin with. A plain row is one text.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from searchmerge.evaluators.causal.documents import Document, Tokens, branches
from searchmerge.evaluators.causal.model import sent

_MOST_READS = 8192
"""Places of a batch whose logits are read, at most: with a vocabulary of 128,000 the logits of so
many take 2 GB in bfloat16, and more than all else in a pass."""


@dataclass(frozen=True)
class Batch:
    """One forward pass, and which of its logits are read.

    The order of a token counts the tokens of its row, document by document, each a tree whose
    branches follow one another. A token stands before those of the orders from its own up to its
    end, which is not one of them, and before no others.

    Attributes:
        tokens: Token ids, ``(n_rows, n_tokens)``, int64.
        n_keep: How many of the last columns have their logits computed.
        kept: Which logits are read, by their places in those columns, row after row.
        at: For each token read, its place in ``kept``.
        targets: For each token read, its id.
        owners: For each token read, the index of its continuation.
        layout: Position, order and end of every token of packed rows, padded on the left (order
            -1, end 0), ``(3, n_rows, n_tokens)``; ``None`` for plain rows, one sequence each,
            padded on the right.
    """

    tokens: Tensor
    n_keep: int
    kept: Tensor
    at: Tensor
    targets: Tensor
    owners: Tensor
    layout: Tensor | None = None

    def on(self, device: torch.device) -> "Batch":
        """Return it with all that a pass needs on a device; the owners stay where they are."""
        return replace(
            self,
            tokens=sent(self.tokens, device),
            kept=sent(self.kept, device),
            at=sent(self.at, device),
            targets=sent(self.targets, device),
            layout=None if self.layout is None else sent(self.layout, device),
        )


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
        places = torch.tensor(self.columns) - first + torch.tensor(self.rows) * n_keep
        kept, at = torch.unique(places, return_inverse=True)  # choices share their first place
        targets, owners = torch.tensor(self.targets), torch.tensor(self.owners)
        return Batch(tokens, n_keep, kept, at, targets, owners, layout)


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
    sizes = [(len(row), max(len(tokens) for tokens, _ in read)) for row, read in rows]
    return [_plain_batch(rows[places]) for places in cut(sizes, batch_tokens)]


def cut(sizes: Sequence[tuple[int, int]], batch_tokens: int) -> Iterator[slice]:
    """Cut rows into batches; a row that is too large gets its own.

    Args:
        sizes: Of each row its tokens, the longest first, and the logits that are read of it.
        batch_tokens: Tokens of a batch, padding included.
    """
    start = 0
    while start < len(sizes):
        most = max(1, batch_tokens // sizes[start][0])
        reads = accumulate(n_read for _, n_read in sizes[start : start + most])
        n_rows = max(1, sum(n_read <= _MOST_READS for n_read in reads))
        yield slice(start, start + n_rows)
        start += n_rows


def _plain_batch(rows: Sequence[tuple[Tokens, list[tuple[Tokens, int]]]]) -> Batch:
    tokens = torch.zeros(len(rows), len(rows[0][0]), dtype=torch.int64)
    reads = _Reads()
    for number, (row, continuations) in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
        for continuation, owner in continuations:
            reads.add(number, range(len(row) - len(continuation), len(row)), continuation, owner)
    return reads.batch(tokens)

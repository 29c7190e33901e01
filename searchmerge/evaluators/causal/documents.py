"""What is scored, as tokens: documents, each a context and its continuations."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

Tokens = tuple[int, ...]


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


def branches(document: Document) -> list[tuple[Tokens, int, int]]:
    """Return a document's continuations in the order in which they are laid out.

    Returns:
        For each continuation its tokens, its owner, and how many of its first tokens have been
        run for those before it.
    """
    laid_out, path = [], 0
    previous: Tokens = ()
    ordered = sorted(zip(document.continuations, document.owners, strict=True))
    for tokens, owner in ordered:
        limit = min(path, len(tokens) - 1)
        n_shared = next((i for i in range(limit) if tokens[i] != previous[i]), limit)
        laid_out.append((tokens, owner, n_shared))
        previous, path = tokens, len(tokens) - 1
    return laid_out


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
        owners = grouped.setdefault(context[excess:] if excess > 0 else context, {})
        if continuation not in owners:
            owners[continuation] = count
            count += 1
        indices.append(owners[continuation])
    documents = [
        Document(c, tuple(owners), tuple(owners.values())) for c, owners in grouped.items()
    ]
    return documents, indices

"""What an adapter does to one tensor of its base: LoRA, DoRA, PiSSA, OLoRA and trained tokens.

The update of a weight is ``scaling * B @ A`` (Hu et al., 2021, arXiv:2106.09685), with a scaling
of ``alpha / r``, or ``alpha / sqrt(r)`` where the adapter is rank-stabilised (Kalajdzievski, 2023,
arXiv:2312.03732). DoRA then gives every output the length that it has learnt (Liu et al., 2024,
arXiv:2402.09353, equation 5). PiSSA (Meng et al., 2024, arXiv:2404.02948) and OLoRA (Büyükakyüz,
2024, arXiv:2406.01775) begin with factors of the base's weight and train on what is left of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

REPEATABLE_STARTS = ("pissa", "olora")
"""Initialisations that change the base in a way that follows from the base alone."""


@dataclass(frozen=True, slots=True)
class Update:
    """How one tensor of the base is changed.

    Attributes:
        factors: Names of A ``(r, n_in)`` and B ``(n_out, r)`` in the adapter's file; ``None``
            where nothing is multiplied.
        replacement: Name of the tensor that takes the place of the base's, before anything else;
            ``None`` where the base's own stays.
        scaling: What ``B @ A``, or the addend, is multiplied by.
        transposed: Whether the base stores this weight as ``(n_in, n_out)``.
        magnitude: Name of the length of each output ``(n_out,)``; ``None`` without DoRA.
        addend: Name of what is added to a bias; ``None`` for nothing.
        rows: Name of the rows that take the place of some of the base's; ``None`` for none.
        tokens: Which rows these are.
        start: The initialisation whose factors are first taken from the base's weight.
        rank: The r of that.
    """

    factors: tuple[str, str] | None = None
    replacement: str | None = None
    scaling: float = 1.0
    transposed: bool = False
    magnitude: str | None = None
    addend: str | None = None
    rows: str | None = None
    tokens: tuple[int, ...] = ()
    start: str | None = None
    rank: int = 0


def updated(update: Update, start: Tensor, own: Mapping[str, Tensor], buffer: Tensor) -> Tensor:
    """Return a tensor as the adapter makes it: float32 where anything is added.

    Args:
        update: What is done.
        start: The base's tensor, or what takes its place.
        own: The adapter's tensors, by their names in its file.
        buffer: Float32, of the size of ``start`` or larger; a weight with factors is a view of it.
    """
    if update.rows:
        rows = own[update.rows]
        whole = start.to(torch.promote_types(start.dtype, rows.dtype), copy=True)
        return whole.index_copy_(0, torch.tensor(update.tokens), rows.to(whole))
    if update.addend:
        return start.float() + update.scaling * own[update.addend].float()
    return _low_rank(update, start, own, buffer) if update.factors else start


def _low_rank(update: Update, start: Tensor, own: Mapping[str, Tensor], buffer: Tensor) -> Tensor:
    """Return a weight with its update, in the buffer."""
    first, second = (own[key].float() for key in update.factors or ())
    if update.start:
        start = _residual(update, start)
    product = buffer[: start.numel()].view(len(second), -1)  # (n_out, n_in)
    torch.mm(second, first, out=product).mul_(update.scaling)
    product.add_(start.T if update.transposed else start)
    if update.magnitude:
        lengths = torch.linalg.vector_norm(product, dim=1)
        product.mul_((own[update.magnitude].float() / lengths).unsqueeze(1))
    return product.T if update.transposed else product


def _residual(update: Update, weight: Tensor) -> Tensor:
    """Return what an initialisation leaves of the base's weight, as PEFT computes it.

    PEFT works in float32 and keeps the result in the dtype of the base.
    """
    plain = weight.float().T if update.transposed else weight.float()
    if update.start == "olora":
        q, r = torch.linalg.qr(plain)
        first, second = r[: update.rank], q[:, : update.rank]
    else:
        u, s, vh = torch.linalg.svd(plain, full_matrices=False)
        root = torch.diag(torch.sqrt(s[: update.rank] / update.scaling))
        first, second = root @ vh[: update.rank], u[:, : update.rank] @ root
    left: Tensor = (plain - update.scaling * second @ first).to(weight.dtype)
    return left.T if update.transposed else left

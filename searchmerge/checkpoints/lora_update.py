"""What an adapter does to one tensor of its base: LoRA, DoRA, PiSSA, OLoRA and trained tokens.

The update of a weight is ``scaling * B @ A`` (Hu et al., 2021, arXiv:2106.09685), with a scaling
of ``alpha / r``, or ``alpha / sqrt(r)`` where the adapter is rank-stabilised (Kalajdzievski, 2023,
arXiv:2312.03732). DoRA then gives every output the length that it has learnt (Liu et al., 2024,
arXiv:2402.09353, equation 5). PiSSA (Meng et al., 2024, arXiv:2404.02948) and OLoRA (Büyükakyüz,
2024, arXiv:2406.01775) begin with factors of the base's weight and train on what is left of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

REPEATABLE_STARTS = ("pissa", "olora")
"""Initialisations that change the base in a way that follows from the base alone."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint lies in a parameter that holds several experts.

    Attributes:
        whole: Shape of the parameter, ``(n_experts, n_out, n_in)``.
        shape: Of the tensor, of two dimensions within an expert, or three of which the first
            goes from one expert to the next.
        strides: Of the tensor in the parameter.
        offset: Of its first element in the parameter.
        is_transposed: Whether the parameter is ``(n_experts, n_in, n_out)``.
    """

    whole: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    is_transposed: bool


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
        place: Where the tensor lies in the parameter that factors of several experts are of,
            ``(n_experts * r, n_in)`` and ``(n_out, r * n_experts)``; ``None`` for plain factors.
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
    place: Place | None = None


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
    if update.place:
        return _of_experts(update, update.place, start, own, buffer)
    return _low_rank(update, start, own, buffer) if update.factors else start


def _of_experts(
    update: Update, place: Place, start: Tensor, own: Mapping[str, Tensor], buffer: Tensor
) -> Tensor:
    """Return a tensor with its part of the update of a parameter, in the buffer.

    In A the experts' rows follow one another; in B the experts' columns of a rank do.
    """
    n_experts, *each = place.whole
    first, second = (own[key].float() for key in update.factors or ())
    first = first.view(n_experts, update.rank, -1)
    second = second.view(len(second), update.rank, n_experts)
    changed = buffer[: start.numel()].view(start.shape).copy_(start)
    parts, step = (changed, place.strides[0]) if changed.ndim == 3 else (changed[None], 0)
    for i, part in enumerate(parts):
        expert, within = divmod(place.offset + i * step, math.prod(each))
        product = (second[:, :, expert] @ first[expert]).mul_(update.scaling)  # (n_out, n_in)
        if place.is_transposed:
            product = product.T.contiguous()
        part.add_(product.as_strided(part.shape, place.strides[-2:], within))
    return changed


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

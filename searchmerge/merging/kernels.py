"""Arithmetic on a chunk of a parameter, and what merge methods share of it.

One source serves compiled code, where everything is fused into one pass over memory, and eager
torch, where each operation is a pass of its own over a chunk that stays in the cache: there,
operations work in place and avoid boolean masks, which are several times slower.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

GRID = 100
"""Densities are stepped by one in so many, and all of them measured at once."""


Row = TypeVar("Row")
"""A row of a method's scalars: :data:`Numbers` where it is packed, a tensor where it is read."""

Numbers = Tensor | Sequence[float] | float
"""One number per expert, or one number for all of them."""

Scalars = TypeVar("Scalars", bound=NamedTuple)


class Chunk(NamedTuple):
    """What a merge function is given: some entries of one parameter, or all of them.

    Attributes:
        deltas: Each expert's task vector, ``(m,)`` float32. They belong to the function, which
            may overwrite them.
        scalars: What :func:`pack` returns, ``(n_scalars, n_experts)`` float32; a function reads
            it by :func:`unpack`.
        kept: What the method kept when it measured, ``(m,)`` each; not to be overwritten.
        positions: Index of each entry in its parameter, ``(m,)`` int64; ``None`` unless keys
            were asked for.
        keys: One int64 per expert, ``(n_experts,)``, e.g. a random generator's.
    """

    deltas: tuple[Tensor, ...]
    scalars: Tensor
    kept: tuple[Tensor, ...] = ()
    positions: Tensor | None = None
    keys: Tensor | None = None


ChunkFunction = Callable[[Chunk], tuple[Tensor, ...]]
"""Pure arithmetic, entry by entry, so that the engine may cut a parameter anywhere.

It is compiled once, so what it depends on is the chunk alone, and it is the same object in every
trial. Numbers that change come in as ``scalars``, never as Python floats. It returns the merged
task vector ``(m,)`` float32 and, where the pass has a ``revise``, two tallies: sums over all
entries, of whole numbers. It is never given more than 2^24 entries at once, or else in rows,
``(n_rows, m)``, of which it returns tallies ``(n_rows,)``.
"""


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make tensors in float32 where no dtype is said, whatever a user's code has set."""
    before = torch.get_default_dtype()
    if before == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def is_on_gpu(numbers: Tensor) -> bool:
    """Return whether this is compiled for a GPU, where what is not NaN is compared soonest."""
    return torch.compiler.is_compiling() and numbers.device.type != "cpu"


def pack(scalars: Iterable[Numbers]) -> Tensor:
    """Return the numbers that a merge function reads, ``(n_scalars, n_experts)`` float32.

    Args:
        scalars: A named tuple of rows, one of them at least with a number per expert.
    """
    rows = [torch.as_tensor(row, dtype=torch.float32) for row in scalars]
    n_experts = max(row.numel() for row in rows)
    return torch.stack([row.expand(n_experts) for row in rows])


def unpack(kind: type[Scalars], chunk: Chunk) -> Scalars:
    """Return the numbers of a chunk by name: the rows of what was packed, ``(n_experts,)`` each.

    Args:
        kind: The named tuple that was packed.
        chunk: The chunk.
    """
    return kind._make([chunk.scalars[i] for i in range(len(kind._fields))])


def keep_at_least(numbers: Tensor, threshold: Tensor) -> Tensor:
    """Zero, in place, the entries whose magnitude is below ``threshold``; return ``numbers``.

    Args:
        numbers: ``(m,)`` float32.
        threshold: One number, 0 or more, on the CPU unless compiled.
    """
    if torch.compiler.is_compiling() or numbers.device.type != "cpu":
        return torch.where(numbers.abs() >= threshold, numbers, 0.0)
    below = torch.nextafter(threshold, threshold.new_tensor(-1.0)).item()
    if below < 0:  # a threshold of 0 keeps everything
        return numbers
    return torch.hardshrink(numbers, below, out=numbers)


def add_scaled(total: Tensor, numbers: Tensor, factor: Tensor) -> Tensor:
    """Return ``total + factor * numbers``, in place of ``total``.

    Args:
        total: ``(m,)`` float32.
        numbers: ``(m,)`` float32.
        factor: One number, on the CPU unless compiled.
    """
    if torch.compiler.is_compiling():
        return total + factor * numbers
    return total.add_(numbers, alpha=factor.item())


def clamp_between(numbers: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamp, in place, to what lies between two numbers; return ``numbers``.

    Args:
        numbers: ``(m,)`` float32.
        low: One number, on the CPU unless compiled.
        high: The same.
    """
    if is_on_gpu(numbers):
        return torch.where(numbers < low, low, torch.where(numbers > high, high, numbers))
    if torch.compiler.is_compiling():
        return numbers.clamp_(low, high)
    return numbers.clamp_(low.item(), high.item())


def excess(numbers: Tensor, least: Tensor) -> Tensor:
    """Return by how much numbers are above ``least``, 0 where they are not, in a fresh tensor.

    On a GPU a product and a difference may be rounded once for both: it is compared before.

    Args:
        numbers: ``(m,)`` float32.
        least: One number.
    """
    if is_on_gpu(numbers):
        return torch.where(numbers > least, numbers - least, 0.0)
    return (numbers - least).relu_()


def exponential(numbers: Tensor, factor: float) -> Tensor:
    """Return ``exp(factor * numbers)``, in place of ``numbers``.

    Compiled for a GPU it is a power of 2, for which that has an instruction.
    """
    if is_on_gpu(numbers):
        return torch.exp2(numbers * (factor * math.log2(math.e)))
    return numbers.mul_(factor).exp_()


def weighted_sum(numbers: Sequence[Tensor], factors: Tensor) -> Tensor:
    """Return the sum of ``(m,)`` tensors, each times its factor, in place of the first.

    Args:
        numbers: One or more, ``(m,)`` float32.
        factors: One number each, on the CPU unless compiled.
    """
    total = numbers[0].mul_(factors[0])
    for more, factor in zip(numbers[1:], factors[1:], strict=True):
        total = add_scaled(total, more, factor)
    return total


def add_up(numbers: Sequence[Tensor]) -> Tensor:
    """Return the sum of ``(m,)`` tensors, in their order, in a fresh tensor."""
    total = numbers[0].clone() if len(numbers) == 1 else numbers[0] + numbers[1]
    for more in numbers[2:]:
        total = total.add_(more)
    return total


def is_positive(numbers: Tensor) -> Tensor:
    """Return 1 where a number is above 0 and 0 elsewhere, float32, in place of ``numbers``."""
    if torch.compiler.is_compiling():
        return torch.where(numbers > 0, 1.0, 0.0)
    return numbers.gt_(0.0)


def is_zero(numbers: Tensor) -> Tensor:
    """Return 1 where a number is 0 and 0 elsewhere, float32, in a fresh tensor."""
    if torch.compiler.is_compiling():
        return torch.where(numbers == 0, 1.0, 0.0)
    return torch.eq(numbers, 0.0, out=torch.empty_like(numbers))


def signed(magnitudes: Tensor, numbers: Tensor) -> Tensor:
    """Return ``magnitudes`` with the signs of ``numbers``, and 0 where those are 0.

    Args:
        magnitudes: ``(m,)`` float32.
        numbers: ``(m,)`` float32.
    """
    if is_on_gpu(numbers):
        of_others = torch.where(numbers == 0, 0.0, magnitudes)
        return torch.where(numbers < 0, -magnitudes, of_others)
    if torch.compiler.is_compiling():
        positive = torch.where(numbers > 0, magnitudes, 0.0)
        return torch.where(numbers < 0, -magnitudes, positive)
    return numbers.sign().mul_(magnitudes)


def is_at_least(numbers: Tensor, least: Tensor | float) -> Tensor:
    """Return 1 where a number is ``least`` or more and 0 elsewhere, float32, in a fresh tensor."""
    if torch.compiler.is_compiling():
        return torch.where(numbers >= least, 1.0, 0.0)
    return torch.ge(numbers, least, out=torch.empty_like(numbers))


def add_up_(numbers: Sequence[Tensor]) -> Tensor:
    """Return the sum of ``(m,)`` tensors, in their order, in place of the first."""
    total = numbers[0]
    for more in numbers[1:]:
        total = total.add_(more)
    return total


def exact_sum(numbers: Tensor) -> Tensor:
    """Return the sum of whole numbers from -256 to 256 over the last dimension, float32.

    It is exact while it is below 2^24.
    """
    return numbers.sum(-1)

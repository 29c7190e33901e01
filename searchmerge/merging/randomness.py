"""Random numbers that depend on seed, expert, parameter name and entry, and on nothing else.

They are computed from a counter, not drawn in turn: the order of parameters, how a parameter is
cut, the device and the other experts make no difference.
"""

import hashlib

import torch
from torch import Tensor

N_DRAWS = 1 << 24
"""A draw is a whole number below this; float32 holds all of them exactly."""

_HALF = 0xFFFFFFFF
_FACTORS = (0x7FEB352D, 0x045D9F3B)  # odd, and below 2^31: products of 32 bits stay in int64


def random_keys(seed: int, experts: tuple[str, ...], name: str) -> Tensor:
    """Return the key of each expert's random numbers in one parameter, ``(n_experts,)`` int64.

    Args:
        seed: Of the plan.
        experts: Their names.
        name: Of the parameter.
    """
    texts = (repr((seed, expert, name)).encode() for expert in experts)
    digests = (hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests])


def draw(positions: Tensor, key: Tensor) -> Tensor:
    """Return a uniform whole number in [0, 2^24) for each entry, ``(m,)`` int64, fresh.

    Each half of the key enters before one of two rounds, each of which mixes all 32 bits:
    ``x ^= x >> 16; x *= factor; x ^= x >> 15``, modulo 2^32.

    Args:
        positions: Index of each entry in its parameter, ``(m,)`` int64, 0 or more.
        key: One of :func:`random_keys`.
    """
    numbers = positions.bitwise_and(_HALF).bitwise_xor_(key.bitwise_and(_HALF))
    numbers = _mix(numbers, _FACTORS[0])
    later = key.bitwise_right_shift(32)
    numbers = numbers.bitwise_xor_(positions.bitwise_right_shift(32).add_(later))
    return _mix(numbers, _FACTORS[1]).bitwise_right_shift_(8)


def keep_drawn(numbers: Tensor, positions: Tensor, key: Tensor, limit: Tensor) -> Tensor:
    """Zero, in place, the entries whose draw is ``limit`` or more; return ``numbers``.

    Args:
        numbers: ``(m,)`` float32.
        positions: See :func:`draw`.
        key: See :func:`draw`.
        limit: ``N_DRAWS`` times the chance of being kept: one number, or one per entry.
    """
    drawn = draw(positions, key)
    if torch.compiler.is_compiling():
        return torch.where(drawn.float() < limit, numbers, 0.0)
    return numbers.mul_(torch.lt(drawn, limit, out=torch.empty_like(numbers)))


def _mix(numbers: Tensor, factor: int) -> Tensor:
    numbers = numbers.bitwise_xor_(numbers.bitwise_right_shift(16))
    numbers = numbers.mul_(factor).bitwise_and_(_HALF)
    return numbers.bitwise_xor_(numbers.bitwise_right_shift(15))

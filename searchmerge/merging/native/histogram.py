"""Counting the bits of numbers on a CPU: as C++, or by operations where there is no compiler."""

import ctypes
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from searchmerge.merging.counting import keys_of
from searchmerge.merging.native.compiler import has_compiler, load
from searchmerge.merging.native.operations import NoSourceError

_logger = logging.getLogger(__name__)

LOW_BITS = 13
"""Of a key, in the low half: so few that the counters of both halves stay in the cache."""

N_LOW = 1 << LOW_BITS
N_HIGH = 1 << (32 - LOW_BITS)

STRIDE = N_LOW + 16
"""Counters of one slot's low halves: a power of two apart they would evict one another."""


def count_high(numbers: Tensor, counts: Tensor) -> None:
    """Add one to the counter of each number's high half.

    Args:
        numbers: ``(m,)`` float32 on the CPU, no NaN.
        counts: ``(N_HIGH,)`` int32 or int64, by the key's high bits, from the least key on.
    """
    if not _count("count_high", numbers, counts, None):
        _tally(counts, _high_half(keys_of(numbers)))


def count_low(numbers: Tensor, table: Tensor, counts: Tensor) -> None:
    """Add one to the counter of each number's low half, in the slot of its high half.

    Args:
        numbers: ``(m,)`` float32 on the CPU, no NaN.
        table: The slot of each high half, ``(N_HIGH,)`` int32.
        counts: ``(n_slots * STRIDE,)`` int32 or int64.
    """
    if _count("count_low", numbers, counts, table):
        return
    keys = keys_of(numbers)
    slots = table.index_select(0, _high_half(keys))
    _tally(counts, slots.mul_(STRIDE).add_(keys.bitwise_and_(N_LOW - 1)))


def _high_half(keys: Tensor) -> Tensor:
    return (keys >> LOW_BITS).add_(N_HIGH // 2)


def _tally(counts: Tensor, cells: Tensor) -> None:
    """Add one to the count of each of ``cells``."""
    counts.scatter_add_(0, cells.long(), torch.ones_like(cells, dtype=counts.dtype))


def _count(name: str, numbers: Tensor, counts: Tensor, table: Tensor | None) -> bool:
    """Count by a function of the source below; return whether that could be compiled."""
    library = _library(counts.dtype)
    if library is None or numbers.dtype != torch.float32 or not numbers.is_cpu:
        return False
    numbers = numbers.contiguous()
    getattr(library, name)(
        ctypes.c_void_p(numbers.data_ptr()),
        ctypes.c_int64(len(numbers)),
        ctypes.c_void_p(None if table is None else table.data_ptr()),
        ctypes.c_void_p(counts.data_ptr()),
    )
    return True


@cache
def _library(dtype: torch.dtype) -> Any:
    """Return the source below, compiled for counters of a dtype; ``None`` where it cannot be."""
    if not has_compiler():
        return None
    counter = {torch.int32: "int32_t", torch.int64: "int64_t"}[dtype]
    try:
        return load(_SOURCE % {"counter": counter, "low_bits": LOW_BITS, "stride": STRIDE})
    except NoSourceError as error:
        _logger.info("counting %s", error)
        return None


_SOURCE = """
#include <cstdint>
#include <cstring>

typedef %(counter)s counter;
const int low_bits = %(low_bits)d, stride = %(stride)d;
const int high_bits = 32 - low_bits, at_once = 1024;

// calls count(key) for the order-preserving key of each number; -0 counts as 0
template <class Count> inline void each_key(const float* numbers, int64_t n, Count count) {
  int32_t keys[at_once];
  for (int64_t begin = 0; begin < n; begin += at_once) {
    const int size = n - begin < at_once ? n - begin : at_once;
    for (int i = 0; i < size; i++) {
      const float number = numbers[begin + i] + 0.0f;
      int32_t bits;
      std::memcpy(&bits, &number, 4);
      keys[i] = bits ^ ((bits >> 31) & 0x7fffffff);
    }
    for (int i = 0; i < size; i++) count(keys[i]);
  }
}

inline int32_t high_half(int32_t key) { return (key >> low_bits) + (1 << (high_bits - 1)); }

extern "C" void count_high(
    const float* numbers, int64_t n, const int32_t*, counter* counts) {
  each_key(numbers, n, [=](int32_t key) { counts[high_half(key)]++; });
}

extern "C" void count_low(
    const float* numbers, int64_t n, const int32_t* table, counter* counts) {
  each_key(numbers, n, [=](int32_t key) {
    counts[(int64_t)table[high_half(key)] * stride + (key & ((1 << low_bits) - 1))]++;
  });
}
"""

"""The whole of what is compiled: a loop over entries of parameters, cut into parts for threads."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from searchmerge.merging.kernels import ChunkFunction
from searchmerge.merging.native.body import PART, Body, Layout
from searchmerge.merging.native.operations import NoSourceError

ENTRIES = "entries.cpp"
"""What the compiler is told to call the lines with the loop over entries."""

STORED = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
"""What entries may be stored as, and the C++ type that holds one."""


class Source(NamedTuple):
    """What is compiled.

    Attributes:
        text: C++, with one function ``run``, which goes over any number of parameters.
        n_outs: How many tensors of each parameter it writes.
        n_sums: How many sums it forms.
    """

    text: str
    n_outs: int
    n_sums: int


def merge_source(function: ChunkFunction, layout: Layout, out: torch.dtype) -> Source:
    """Return what writes ``base + scale * merged task vector``, and sums the tallies.

    Args:
        function: The method's arithmetic.
        layout: What it reads.
        out: The dtype that is written.

    Raises:
        NoSourceError: If it does what is not written here.
    """
    body = Body(layout)
    merged, *tallies = body.follow(function)
    counted = [str(tally.names) for tally in tallies]
    if not set(counted) <= body.counters.keys():
        raise NoSourceError("returns a tally that is no sum over entries")
    body.loop.append(f"put(out0[i], origin(in0[i]) + scale * {body.number(merged)});")
    sums = [name if body.counters[name] else f"total({name}, n)" for name in counted]
    return _source(body, layout, [out], sums)


def compute_source(function: ChunkFunction, layout: Layout) -> Source:
    """Return what writes all that a function returns, float32 each.

    Args:
        function: The method's arithmetic.
        layout: What it reads.

    Raises:
        NoSourceError: If it does what is not written here.
    """
    body = Body(layout)
    values = body.follow(function)
    if body.counters:
        raise NoSourceError("returns tallies beside entries")
    body.loop += [f"put(out{i}[i], {body.number(value)});" for i, value in enumerate(values)]
    return _source(body, layout, [torch.float32] * len(values), [])


def products_source(
    function: ChunkFunction, layout: Layout, n_sets: int, numbers: torch.dtype
) -> Source:
    """Return what sums the products of numbers with what is merged under each set of scalars.

    Args:
        function: The method's arithmetic.
        layout: What it reads; behind all of that are the numbers.
        n_sets: How many sets of scalars there are.
        numbers: The dtype of the numbers.

    Raises:
        NoSourceError: If it does what is not written here.
    """
    body = Body(layout)
    merged = body.number(body.follow(function)[0])
    body.loop.append(f"products[i] = {merged} * {body.add_input(numbers)};")
    return _source(body, layout, [], ["total(products, n)"], n_sets)


def _source(
    body: Body,
    layout: Layout,
    outs: Sequence[torch.dtype],
    sums: Sequence[str],
    n_sets: int = 1,
) -> Source:
    """Return the statements with all that is around them."""
    unknown = {*body.inputs, *outs} - STORED.keys()
    if unknown:
        raise NoSourceError(f"reads or writes {', '.join(sorted(map(str, unknown)))}")
    reads = [
        f"const {STORED[dtype]}* __restrict in{i} = (const {STORED[dtype]}*)in[{i}] + begin;"
        for i, dtype in enumerate(body.inputs)
    ]
    writes = [
        f"{STORED[dtype]}* __restrict out{i} = ({STORED[dtype]}*)out[{i}] + begin;"
        for i, dtype in enumerate(outs)
    ]
    counters = [
        f"int32_t {name} = 0;" if is_whole else f"float {name}[part_size];"
        for name, is_whole in body.counters.items()
    ]
    made = [f"sums[{i}] = {text};" for i, text in enumerate(sums)]
    text = _TEXT.format(
        entries=ENTRIES,
        part=PART,
        n_in=len(body.inputs),
        n_out=len(outs),
        n_sets=n_sets,
        set_size=math.prod(layout.scalars),
        n_keys=layout.n_keys,
        n_sums=len(sums),
        tensors="\n  ".join(reads + writes),
        before="\n    ".join(body.before + counters),
        loop="\n      ".join(body.loop),
        sums="\n    ".join(made),
    )
    return Source(f'#line 1 "{ENTRIES}"' + _PRELUDE + text, len(outs), n_sets * len(sums))


_PRELUDE = r"""
#include <cstdint>
#include <cstring>

// there are vectors of these in the C library
extern "C" __attribute__((simd("notinbranch"), const)) float expf(float) noexcept;
extern "C" __attribute__((simd("notinbranch"), const)) float tanhf(float) noexcept;

namespace {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

inline uint32_t bits_of(float a) { uint32_t b; std::memcpy(&b, &a, 4); return b; }
inline float float_of(uint32_t b) { float a; std::memcpy(&a, &b, 4); return a; }

inline float number(float a) { return a; }
inline float number(double a) { return (float)a; }
inline float number(bfloat16 a) { return float_of((uint32_t)a.bits << 16); }
inline float number(float16 a) {
  const uint32_t magnitude = (a.bits & 0x7fffu) << 13;
  const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t rest = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled;
  return float_of(rest | (uint32_t)(a.bits & 0x8000u) << 16);
}

inline double origin(double a) { return a; }
template <class T> inline float origin(T a) { return number(a); }

inline void put(float& to, float a) { to = a; }
inline void put(float& to, double a) { to = (float)a; }
inline void put(double& to, double a) { to = a; }
inline void put(bfloat16& to, float a) {
  const uint32_t b = bits_of(a);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  to.bits = (uint16_t)(a != a ? 0x7fc0u : rounded);
}
inline void put(float16& to, float a) {
  const uint32_t b = bits_of(a), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t rounded = magnitude < 0x38800000u ? small : normal;
  rounded = magnitude >= 0x477ff000u ? 0x7c00u : rounded;
  rounded = magnitude > 0x7f800000u ? 0x7e00u : rounded;
  to.bits = (uint16_t)(sign | rounded);
}
template <class T> inline void put(T& to, double a) { put(to, (float)a); }

// the second where it is beyond the first, or NaN; else the first, NaN included
template <class T> inline T at_least(T a, T low) { return (low > a) | (low != low) ? low : a; }
template <class T> inline T at_most(T a, T high) { return (high < a) | (high != high) ? high : a; }
template <class T> inline T positive(T a) { return at_least(a, (T)0); }

inline float magnitude(float a) { return __builtin_fabsf(a); }
inline double magnitude(double a) { return __builtin_fabs(a); }
inline int64_t magnitude(int64_t a) { return a < 0 ? -a : a; }
inline float root(float a) { return __builtin_sqrtf(a); }
inline double root(double a) { return __builtin_sqrt(a); }

inline float below(float a) { return __builtin_floorf(a); }
inline double below(double a) { return __builtin_floor(a); }
inline float above(float a) { return __builtin_ceilf(a); }
inline double above(double a) { return __builtin_ceil(a); }

#line 1 "sums.cpp"
inline double total(const float* products, int64_t n) {
  float lanes[32] = {};
  const int64_t whole = n / 32 * 32;
  for (int64_t i = 0; i < whole; i += 32)
    for (int64_t lane = 0; lane < 32; lane++) lanes[lane] += products[i + lane];
  double sum = 0;
  for (int64_t lane = 0; lane < 32; lane++) sum += lanes[lane];
  for (int64_t i = whole; i < n; i++) sum += products[i];
  return sum;
}
"""

_TEXT = """
#line 1 "{entries}"
const int64_t part_size = {part}, n_in = {n_in}, n_out = {n_out}, n_keys = {n_keys};
const int64_t n_sets = {n_sets}, set_size = {set_size}, n_sums = {n_sums};

void part(
    const void* const* in, void* const* out, const float* sets, const int64_t* keys,
    int64_t first, float scale, int64_t begin, int64_t n, double* sums) {{
  float products[part_size];
  {tensors}
  for (int64_t set = 0; set < n_sets; set++, sums += n_sums) {{
    const float* const scalars = sets + set * set_size;
    {before}
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) {{
      {loop}
    }}
    {sums}
  }}
}}

}}  // namespace

#line 1 "run.cpp"
// of parameter k the parts are starts[k] to starts[k + 1]; of each there is room for its sums
extern "C" void run(
    int64_t n_parameters, const void* const* in, void* const* out, const float* sets,
    const int64_t* keys, const int64_t* firsts, const float* scales, const int64_t* sizes,
    const int64_t* starts, double* of_parts, double* sums, int n_threads) {{
  const int64_t n_parts = starts[n_parameters], n_all = n_sets * n_sums;
  const int64_t even = n_parts / (8 * n_threads);
  const int64_t at_once = even < 1 ? 1 : even > 64 ? 64 : even;
  int64_t k = 0;
#pragma omp parallel for num_threads(n_threads) schedule(dynamic, at_once) firstprivate(k)
  for (int64_t p = 0; p < n_parts; p++) {{
    while (p < starts[k]) k--;
    while (p >= starts[k + 1]) k++;
    const int64_t begin = (p - starts[k]) * part_size, left = sizes[k] - begin;
    part(in + k * n_in, out + k * n_out, sets + k * n_sets * set_size, keys + k * n_keys,
         firsts[k] + begin, scales[k], begin, left < part_size ? left : part_size,
         of_parts + p * n_all);
  }}
  for (int64_t i = 0; i < n_all; i++) sums[i] = 0;
  for (int64_t p = 0; p < n_parts; p++)
    for (int64_t i = 0; i < n_all; i++) sums[i] += of_parts[p * n_all + i];
}}
"""

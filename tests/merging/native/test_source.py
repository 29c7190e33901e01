"""Entries are read from, and rounded to, every dtype as torch does it."""

import pytest
import torch

from searchmerge.merging.kernels import Chunk
from searchmerge.merging.native import native
from searchmerge.merging.native.body import Layout
from searchmerge.merging.native.operations import NoSourceError
from searchmerge.merging.native.source import merge_source, products_source
from searchmerge.merging.operands import Operands
from tests.merging.compiling import needs_compiler

pytestmark = needs_compiler

HALVES = (torch.bfloat16, torch.float16)
REAL = torch.float32


def delta(chunk: Chunk):
    return (chunk.deltas[0] * 1.0,)


def with_a_wrong_tally(chunk: Chunk):
    return (chunk.deltas[0] * 1.0, chunk.deltas[0] * 2.0)


def merged(base, expert, out_dtype):
    out = torch.empty(len(base), dtype=out_dtype)
    done, tally = native.merge(delta, Operands(base, (expert,), torch.zeros(1, 1)), 1.0, out)
    assert done
    assert tally is None
    return out


def assert_same_bits(found, wanted):
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
    same = (found.view(whole) == wanted.view(whole)) | found.isnan() & wanted.isnan()
    assert same.all(), (found[~same][:5], wanted[~same][:5])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_16_bits_is_read(dtype):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert_same_bits(merged(torch.zeros(2**16), numbers, REAL), 0.0 + numbers.float())


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_32_bits_is_rounded(dtype):
    # each of 16 bits, followed by what decides which way the rest is rounded
    whole = torch.arange(-(2**15), 2**15).repeat_interleave(10) * 2**16
    rest = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x1000, 0x0FFF, 0x1001, 0x3000, 0xFFFF])
    numbers = (whole + rest.repeat(2**16)).to(torch.int32).view(REAL)
    numbers = numbers[~(numbers == 0)]
    assert_same_bits(merged(torch.zeros(len(numbers)), numbers, dtype), numbers.to(dtype))


@pytest.mark.parametrize("out", [torch.float64, REAL, *HALVES])
@pytest.mark.parametrize("base", [torch.float64, REAL, *HALVES])
@pytest.mark.parametrize("expert", [torch.float64, REAL, *HALVES])
def test_any_dtypes_are_merged_into_any(base, expert, out):
    draw = torch.Generator().manual_seed(0)
    origin = torch.randn(1000, generator=draw).to(base)
    other = torch.randn(1000, generator=draw).to(expert)
    change = other.float() - origin.float()
    wanted = (origin + change.double()) if base == torch.float64 else origin.float() + change
    assert_same_bits(merged(origin, other, out), wanted.to(out))


def test_other_dtypes_are_refused():
    layout = Layout(REAL, (torch.int8,), (), (1, 1), 0)
    with pytest.raises(NoSourceError, match=r"reads or writes torch\.int8"):
        merge_source(delta, layout, REAL)
    layout = Layout(REAL, (REAL,), (), (1, 1), 0)
    with pytest.raises(NoSourceError, match=r"reads or writes torch\.complex64"):
        products_source(delta, layout, 2, torch.complex64)


def test_a_tally_that_is_no_sum_is_refused():
    layout = Layout(REAL, (REAL,), (), (1, 1), 0)
    with pytest.raises(NoSourceError, match="returns a tally that is no sum over entries"):
        merge_source(with_a_wrong_tally, layout, REAL)

"""Halves of keys are counted alike with a compiler and without."""

import numpy as np
import pytest
import torch

from searchmerge.merging.counting import keys_of
from searchmerge.merging.native import compiler, histogram
from searchmerge.merging.native.histogram import LOW_BITS, N_HIGH, N_LOW, STRIDE

ODD = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 1.0 + 2**-23, 3.4e38, -3.4e38, float("inf")]


@pytest.fixture(params=["g++", "/no/compiler"])
def with_and_without_a_compiler(request, monkeypatch):
    monkeypatch.setenv("CXX", request.param)
    for kept in (compiler.has_compiler, histogram._library):
        kept.cache_clear()
    yield
    for kept in (compiler.has_compiler, histogram._library):
        kept.cache_clear()


def numbers():
    draw = torch.Generator().manual_seed(0)
    return torch.cat([torch.tensor(ODD), torch.randn(5000, generator=draw)])


@pytest.mark.usefixtures("with_and_without_a_compiler")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_halves_are_counted(dtype):
    given = numbers()
    keys = keys_of(given).numpy().astype(np.int64)
    high = torch.zeros(N_HIGH, dtype=dtype)
    for _ in range(2):
        histogram.count_high(given, high)
    wanted = np.bincount((keys >> LOW_BITS) + N_HIGH // 2, minlength=N_HIGH)
    assert np.array_equal(high.numpy(), 2 * wanted)

    chosen = np.flatnonzero(wanted)[::7]
    table = torch.zeros(N_HIGH, dtype=torch.int32)
    table[chosen] = torch.arange(1, len(chosen) + 1, dtype=torch.int32)
    low = torch.zeros((len(chosen) + 1) * STRIDE, dtype=dtype)
    histogram.count_low(given[::1], table, low)
    for slot, place in enumerate(chosen, start=1):
        own = keys[(keys >> LOW_BITS) + N_HIGH // 2 == place]
        counted = low[slot * STRIDE : slot * STRIDE + N_LOW].numpy()
        assert np.array_equal(counted, np.bincount(own & (N_LOW - 1), minlength=N_LOW))
    assert low.sum() == len(given)


@pytest.mark.usefixtures("with_and_without_a_compiler")
def test_numbers_with_gaps_between_them_are_counted():
    given = numbers()
    counts, wanted = (torch.zeros(N_HIGH, dtype=torch.int32) for _ in range(2))
    histogram.count_high(given[::3], counts)
    histogram.count_high(given[::3].clone(), wanted)
    assert torch.equal(counts, wanted)

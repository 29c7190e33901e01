"""Arithmetic runs compiled or chunk by chunk, and falls back where compiling fails."""

import itertools
import logging
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from searchmerge.merging.election import merge_elected, positive_bound
from searchmerge.merging.engine import CHUNK, Engine, Operands
from searchmerge.merging.kernels import (
    Chunk,
    add_scaled,
    add_up,
    exact_sum,
    is_at_least,
    is_positive,
    is_zero,
    keep_at_least,
    pack,
    signed,
    unpack,
    weighted_sum,
)


def mean_delta(chunk: Chunk):
    return (weighted_sum(chunk.deltas, chunk.scalars[0]),)


def positions_and_keys(chunk: Chunk):
    return (chunk.positions.float() + chunk.keys.sum().float() + 0 * chunk.deltas[0],)


def needs_python(chunk: Chunk):
    """Cannot be compiled as one graph: its flow depends on the numbers."""
    if chunk.deltas[0].sum().item() > 0:
        return (chunk.deltas[0] * 2,)
    return (chunk.deltas[0],)


def operands(n_entries, dtypes=(torch.float32, torch.bfloat16), **more):
    draw = torch.Generator().manual_seed(n_entries)
    base, *experts = (torch.randn(n_entries, generator=draw).to(dtype) for dtype in dtypes)
    return Operands(base, tuple(experts), torch.full((1, len(experts)), 0.5), **more)


@pytest.mark.parametrize("n_entries", [0, 1, 63, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_chunks_cover_every_entry(n_entries, dtype):
    own = operands(n_entries, (torch.float32, torch.bfloat16, torch.float16))
    out = torch.full((n_entries,), 9.0, dtype=dtype)
    assert Engine("eager").merge(mean_delta, own, 2.0, out) is None
    delta = sum(0.5 * (expert.float() - own.base) for expert in own.experts)
    torch.testing.assert_close(out, (own.base + 2.0 * delta).to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_positions_count_from_the_start_of_the_parameter(kind):
    own = operands(CHUNK + 100, keys=torch.tensor([1, 2]), start=7)
    [found] = Engine(kind).compute(positions_and_keys, own)
    assert torch.equal(found, torch.arange(7, 107 + CHUNK).float() + 3)


def test_code_that_cannot_be_compiled_runs_all_the_same_after_one_warning(caplog):
    engine, out = Engine("compiled"), torch.empty(100)
    own = operands(100, (torch.float32, torch.float32))
    with caplog.at_level(logging.WARNING, logger="searchmerge"):
        for _ in range(3):
            engine.merge(needs_python, own, 1.0, out)
    expected = own.base + needs_python(Chunk((own.experts[0] - own.base,), own.scalars))[0]
    torch.testing.assert_close(out, expected)
    [record] = caplog.records
    assert record.message.startswith("merging runs uncompiled, as compiling failed: ")
    assert not engine.is_compiled(torch.device("cpu"))


@pytest.mark.slow
def test_without_a_compiler_merging_runs_all_the_same(tmp_path):
    code = """
import logging, torch
from searchmerge.merging.merger import Merger
from searchmerge.merging.method import default_plan
from searchmerge.merging.task_vectors import TaskVectors
logging.basicConfig(format="%(message)s")
base = {"w": torch.zeros(1000)}
vectors = TaskVectors.from_weights(base, {"a": {"w": torch.arange(1000.0)}})
plan = default_plan("ties", ["a"], density=1.0)
for _ in range(2):
    [(_, merged)] = Merger(vectors, engine="compiled").merged(plan)
    print(merged.sum().item())
"""
    environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["499500.0", "499500.0"]
    assert done.stderr.count("merging runs uncompiled, as compiling failed") == 2  # two mergers


def test_auto_compiles_on_a_gpu_only():
    assert not Engine("auto").is_compiled(torch.device("cpu"))
    assert Engine("auto").is_compiled(torch.device("cuda"))
    assert not Engine("eager").is_compiled(torch.device("cuda"))


@pytest.mark.parametrize("threshold", [0.0, 1e-45, 0.5, 1.0, 3.4e38])
def test_trimming_keeps_what_is_at_the_threshold(threshold):
    numbers = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 0.5, -0.5, 1.0, -1.0, -3.4e38])
    expected = torch.where(numbers.abs() >= threshold, numbers, 0.0)
    assert torch.equal(keep_at_least(numbers.clone(), torch.tensor(threshold)), expected)


ODD = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 0.3, -0.3, 1.0, -1.0, 1.5, -(2.0**24), 1e30, -1e30]


class Elected(NamedTuple):
    coefficients: torch.Tensor | list[float]
    majority: torch.Tensor | float
    bound: torch.Tensor | float


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("majority", [1.0, -1.0])
def test_compiled_elections_equal_eager_ones_to_the_bit(majority, aggregate):
    columns = torch.tensor(list(itertools.product(ODD, repeat=3))).T
    scalars = pack(Elected([0.5, 1.0, -2.0], majority, positive_bound(majority)))
    own = Operands(torch.zeros(columns.shape[1]), tuple(columns), scalars)

    def elect(chunk: Chunk):
        merged, tally = merge_elected(list(chunk.deltas), unpack(Elected, chunk), aggregate)
        return merged, merged * 0 + tally[0], merged * 0 + tally[1]

    eager, compiled = (Engine(kind).compute(elect, own) for kind in ("eager", "compiled"))
    for one, other in zip(eager, compiled, strict=True):
        assert torch.equal(one, other)


def test_the_small_operations_are_what_they_say():
    numbers = torch.tensor([0.0, 2.0, -3.0])
    assert add_scaled(numbers.clone(), numbers, torch.tensor(2.0)).tolist() == [0, 6, -9]
    assert add_up([numbers]).tolist() == [0, 2, -3]
    assert add_up([numbers] * 3).tolist() == [0, 6, -9]
    assert is_zero(numbers).tolist() == [1, 0, 0]
    assert is_positive(numbers.abs()).tolist() == [0, 1, 1]
    assert is_at_least(numbers, 0.0).tolist() == [1, 1, 0]
    assert is_at_least(numbers, torch.tensor(2.0)).tolist() == [0, 1, 0]
    assert signed(torch.tensor([5.0, 6.0, 7.0]), numbers).tolist() == [0, 6, -7]
    assert exact_sum(numbers) == -1
    assert numbers.tolist() == [0, 2, -3]

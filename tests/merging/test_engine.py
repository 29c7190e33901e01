"""Arithmetic runs compiled or chunk by chunk, and falls back where compiling fails."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from searchmerge.merging.chunks import CHUNK
from searchmerge.merging.engine import Engine
from searchmerge.merging.kernels import Chunk
from searchmerge.merging.operands import Operands
from tests.merging.compiling import needs_compiler


def positions_and_keys(chunk: Chunk):
    keys = (chunk.keys[0] + chunk.keys[1]).float()
    return (chunk.positions.float() + keys + 0 * chunk.deltas[0],)


def needs_python(chunk: Chunk):
    """Cannot be compiled as one graph: its flow depends on the numbers."""
    if chunk.deltas[0].sum().item() > 0:
        return (chunk.deltas[0] * 2,)
    return (chunk.deltas[0],)


def operands(n_entries, dtypes=(torch.float32, torch.bfloat16), **more):
    draw = torch.Generator().manual_seed(n_entries)
    base, *experts = (torch.randn(n_entries, generator=draw).to(dtype) for dtype in dtypes)
    return Operands(base, tuple(experts), torch.full((1, len(experts)), 0.5), **more)


@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_positions_count_from_the_start_of_the_parameter(kind):
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    own = operands(CHUNK + 100, dtypes, keys=torch.tensor([1, 2]), start=7)
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


def test_what_torch_alone_compiles_is_left_to_it_or_runs_chunk_by_chunk(monkeypatch):
    """A method of one's own may compute what is not written as C++."""

    def cubed(chunk: Chunk):
        return (torch.pow(chunk.deltas[0], 3),)

    own, taken = operands(100, (torch.float32, torch.float32)), []
    for kind in ("auto", "compiled"):
        engine, out = Engine(kind), torch.empty(100)
        monkeypatch.setattr(engine.compiled, "merge", lambda *a: (taken.append(a[0]), None))
        engine.merge(cubed, own, 1.0, out)
        torch.testing.assert_close(out, own.base + (own.experts[0] - own.base) ** 3)
        assert not Engine("auto").is_compiled(torch.device("cpu"), cubed)
    assert taken == [cubed]


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


@needs_compiler
def test_ways_that_round_otherwise_are_told_apart():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert Engine("eager").way(cpu) == Engine("eager").way(gpu) == "chunks"
    assert Engine("auto").way(cpu) == Engine("compiled").way(cpu) == "native"
    assert Engine("auto").way(gpu) == "torch"


@needs_compiler
def test_auto_compiles_on_every_device():
    assert Engine("auto").is_compiled(torch.device("cpu"))
    assert not Engine("eager").is_compiled(torch.device("cpu"))
    assert Engine("auto").is_compiled(torch.device("cuda"))
    assert not Engine("eager").is_compiled(torch.device("cuda"))

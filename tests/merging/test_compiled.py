"""Kernels are compiled once for every size, and what cannot be compiled is left to others."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from searchmerge.merging.chunks import Chunks
from searchmerge.merging.compiled import Compiled
from searchmerge.merging.kernels import Chunk, weighted_sum
from searchmerge.merging.operands import Operands
from searchmerge.merging.rows import ROW, merge_rows, new_tallies, numbers_of, rows_of, total_of
from tests.merging.test_rows import (
    in_rows_of,
    merge_mean,
    products_in_rows,
    sets_of,
    ties_operands,
)


def mean_delta(chunk: Chunk):
    return (weighted_sum(chunk.deltas, chunk.scalars[0]),)


def needs_python(chunk: Chunk):
    """Cannot be compiled as one graph: its flow depends on the numbers."""
    if chunk.deltas[0].sum().item() > 0:
        return (chunk.deltas[0] * 2,)
    return (chunk.deltas[0],)


def operands(n_entries):
    draw = torch.Generator().manual_seed(n_entries)
    base, *experts = (torch.randn(n_entries, generator=draw) for _ in range(3))
    return Operands(base, tuple(experts), torch.full((1, 2), 0.5))


def test_what_cannot_be_compiled_is_not_done_and_the_reason_is_said(caplog):
    compiled, own, out = Compiled(), operands(100), torch.full((100,), 9.0)
    assert not compiled.is_broken
    with caplog.at_level(logging.WARNING, logger="searchmerge"):
        assert compiled.merge(needs_python, own, 1.0, out) == (False, None)
    assert compiled.is_broken
    assert compiled.compute(needs_python, own) is None
    assert caplog.records[0].message.startswith("merging runs uncompiled, as compiling failed: ")
    assert torch.equal(out, torch.full((100,), 9.0))


@pytest.mark.slow
def test_all_sets_of_scalars_are_multiplied_at_once_for_every_number_of_entries():
    sets, compiled = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.25, -2.0]]]), Compiled()
    for n_entries in (1000, 77, 5000):
        own = operands(n_entries)
        numbers = torch.randn(n_entries, generator=torch.Generator().manual_seed(1))
        [found] = compiled.products(mean_delta, own, sets, numbers)
        [wanted] = Chunks().products(mean_delta, own, sets, numbers)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_kernels_are_compiled_once_for_every_number_of_rows():
    compiled = Compiled()
    for n_rows in (40, 3, 1000):
        operands = ties_operands(n_rows * ROW)
        wanted, tally = in_rows_of(merge_mean, operands, 0.5)
        out = torch.empty(n_rows, ROW)
        tallies = new_tallies(2, n_rows, out.device)
        rows = rows_of(operands, numbers_of(operands.scalars, 0.5))
        with torch.compiler.set_stance("default" if n_rows == 40 else "fail_on_recompile"):
            assert compiled.run_rows(merge_rows, merge_mean, rows, (out, *tallies))
        torch.testing.assert_close(out.view(-1), wanted)
        assert torch.equal(total_of(tallies), tally)


@pytest.mark.slow
def test_products_are_compiled_once_for_every_number_of_rows():
    compiled = Compiled()
    for n_rows in (40, 3, 1000):
        operands = ties_operands(n_rows * ROW)
        weights = torch.randn(n_rows * ROW, generator=torch.Generator().manual_seed(1))

        def run(kernel, rows, outs, n_rows=n_rows):
            with torch.compiler.set_stance("default" if n_rows == 40 else "fail_on_recompile"):
                assert compiled.run_rows(kernel, merge_mean, rows, outs)

        found = products_in_rows(operands, sets_of(operands), weights, run)
        [wanted] = Chunks().products(merge_mean, operands, sets_of(operands), weights)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


MERGES = """
import torch
from searchmerge.merging.compiled import Compiled
from tests.merging.test_compiled import mean_delta, operands
own, out = operands(1000), torch.zeros(1000)
done, _ = Compiled().merge(mean_delta, own, 1.0, out)
wanted = own.base + 0.5 * sum(expert - own.base for expert in own.experts)
assert done
print(float((out - wanted).abs().max()) < 1e-5)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="one width of vectors alone"
)
def test_processors_with_other_vectors_may_share_what_is_kept_of_compiled_code(tmp_path):
    for capability in ("avx512", "avx2", "avx512"):
        kept = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run(
            [sys.executable, "-c", MERGES],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **kept},
        )
        assert done.stdout.strip() == "True", done.stderr[-3000:]

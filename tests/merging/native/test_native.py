"""Every method's arithmetic is written as C++, and does what it does chunk by chunk."""

import pytest
import torch

from searchmerge.errors import SpecError
from searchmerge.merging.chunks import Chunks
from searchmerge.merging.engine import Engine
from searchmerge.merging.kernels import Chunk, exact_sum, weighted_sum
from searchmerge.merging.merger import Merger
from searchmerge.merging.method import METHODS, default_plan, linear_hyperparameter
from searchmerge.merging.native import native
from searchmerge.merging.native.body import PART
from searchmerge.merging.operands import Operands
from searchmerge.merging.task_vectors import TaskVectors
from tests.merging.compiling import needs_compiler

pytestmark = needs_compiler

SIZES = (1, 63, PART - 1, PART + 1, 20 * PART + 17)


def counted(chunk: Chunk):
    positive = torch.where(chunk.deltas[0] > 0, 1.0, -1.0)
    return (weighted_sum(chunk.deltas, chunk.scalars[0]), exact_sum(positive * 256))


def operands(n_entries, dtype=torch.float32):
    draw = torch.Generator().manual_seed(n_entries)
    base, *experts = (torch.randn(n_entries, generator=draw).to(dtype) for _ in range(4))
    return Operands(base, tuple(experts), torch.randn(1, 3, generator=draw))


def models(dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(70, 90, generator=draw), "b": torch.randn(3, generator=draw)}
    experts = {
        expert: {
            n: (t + 0.1 * torch.randn(t.shape, generator=draw)).to(dtype) for n, t in base.items()
        }
        for expert in ("math", "code", "law")
    }
    return {name: t.to(dtype) for name, t in base.items()}, experts


class Refusing(Chunks):
    """Takes nothing from C++."""

    def merge(self, *_):
        raise AssertionError("merged chunk by chunk")

    def compute(self, *_):
        raise AssertionError("computed chunk by chunk")

    def products(self, *_):
        raise AssertionError("multiplied chunk by chunk")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_methods_arithmetic_is_written_and_vectorised(method, monkeypatch):
    base, experts = models()
    vectors = TaskVectors.from_weights(base, experts)
    plan = default_plan(method, list(experts))
    wanted = dict(Merger(vectors, engine="eager").merged(plan))
    merger = Merger(vectors, engine="auto")
    merger._engine.chunks = Refusing()
    for name, found in merger.merged(plan):
        torch.testing.assert_close(found, wanted[name], rtol=1e-2, atol=1e-2)
    try:
        linear_hyperparameter(method)
    except SpecError:
        return
    directions = merger.directions(plan)
    directions.products("a.weight", torch.ones(70, 90))


@pytest.mark.parametrize("n_entries", SIZES)
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_a_parameter_of_any_size_is_merged_and_counted(n_entries, scale):
    given = operands(n_entries)
    found, wanted = torch.empty(n_entries), torch.empty(n_entries)
    done, tally = native.merge(counted, given, scale, found)
    expected = Chunks().merge(counted, given, scale, wanted)
    assert done
    torch.testing.assert_close(found, wanted)
    assert torch.equal(tally, expected.double())


@pytest.mark.parametrize("n_entries", SIZES)
def test_products_do_not_depend_on_the_number_of_threads(n_entries):
    given, numbers = operands(n_entries, torch.bfloat16), torch.randn(n_entries).bfloat16()
    sets = torch.randn(5, 1, 3, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            found.append(native.products(counted, given, sets, numbers))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    deltas = torch.stack(
        [(expert.float() - given.base.float()).double() for expert in given.experts]
    )
    wanted = sets[:, 0].double() @ deltas @ numbers.double()
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-3)


def test_tensors_with_gaps_are_left_to_others():
    given, out = operands(200), torch.empty(400)[::2]
    assert native.merge(counted, given, 1.0, out) == (False, None)
    gaps = Operands(torch.zeros(400)[::2], given.experts, given.scalars)
    assert native.compute(lambda chunk: (chunk.deltas[0] * 1,), gaps) is None
    assert native.products(counted, gaps, given.scalars[None], torch.ones(200)) is None
    engine = Engine("auto")
    tally = engine.merge(counted, gaps, 1.0, out)
    torch.testing.assert_close(
        out, weighted_sum([e.clone() for e in given.experts], given.scalars[0])
    )
    assert tally is not None


def test_a_function_is_written_once(monkeypatch):
    given = operands(100)
    out = torch.empty(100)
    assert native.merge(counted, given, 1.0, out)[0]
    monkeypatch.setenv("CXX", "/no/compiler")
    assert native.merge(counted, operands(50), 1.0, out[:50])[0]
    halves = operands(100, torch.float16)
    assert native.merge(counted, halves, 1.0, out) == (False, None)  # another kernel


def summed(chunk: Chunk):
    return (chunk.deltas[0] * 1, chunk.deltas[1].sum(-1), (chunk.deltas[0] * 1e6).sum(-1))


def test_sums_of_any_numbers_are_no_whole_ones():
    given = operands(10 * PART + 5)
    done, sums = native.merge(summed, given, 1.0, torch.empty(len(given.base)))
    assert done
    deltas = [(expert - given.base).double() for expert in given.experts]
    wanted = torch.stack([deltas[1].sum(), deltas[0].sum() * 1e6])
    torch.testing.assert_close(sums, wanted, rtol=1e-4, atol=1e-3)
    given.experts[1][7] = torch.nan
    assert native.merge(summed, given, 1.0, torch.empty(len(given.base)))[1][0].isnan()


def test_numbers_that_do_not_lie_as_kernels_read_them_are_made_so_or_left():
    given, out = operands(300), torch.empty(300)
    wanted = torch.empty(300)
    native.merge(counted, given, 1.0, wanted)
    others = Operands(given.base, given.experts, given.scalars.double().T.contiguous().T)
    assert native.merge(counted, others, 1.0, out)[0]
    torch.testing.assert_close(out, wanted)
    assert native.merge(counted, given, 1.0, torch.empty(299)) == (False, None)
    negated = Operands(torch._neg_view(given.base), given.experts, given.scalars)
    assert native.merge(counted, negated, 1.0, out) == (False, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(dtype):
    base, experts = models()
    wanted = {}
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            for method in ("karcher", "pcb", "breadcrumbs", "ties"):
                merger = Merger(TaskVectors.from_weights(base, experts))
                for name, found in merger.merged(default_plan(method, list(experts))):
                    assert torch.equal(found, wanted.setdefault((method, name), found))
        finally:
            torch.set_default_dtype(torch.float32)

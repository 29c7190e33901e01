"""Parameters that lie alike are merged by one call."""

import pytest
import torch

from searchmerge.merging.kernels import Chunk, exact_sum, weighted_sum
from searchmerge.merging.method import Pass
from searchmerge.merging.native import native_pass
from searchmerge.merging.native.body import PART
from searchmerge.merging.native.native import Merges, merge
from searchmerge.merging.native.native_pass import NativePass
from searchmerge.merging.operands import Parameter
from tests.merging.compiling import needs_compiler

pytestmark = needs_compiler

SIZES = (0, 1, 5 * PART + 3, 0, PART, 63, 2 * PART - 1, 0)
"""Of the parameters: none, one or several parts of each, in any order."""


def counted(chunk: Chunk):
    positive = torch.where(chunk.deltas[0] > 0, 1.0, -1.0)
    return weighted_sum(chunk.deltas, chunk.scalars[0]), exact_sum(positive)


def drawn(chunk: Chunk):
    moved = (chunk.positions * 3 + chunk.keys[0]).float()
    return (chunk.deltas[0] * chunk.scalars[0, 1] + moved,)


def parameters(dtypes=(torch.float32,)):
    draw = torch.Generator().manual_seed(0)
    for i, size in enumerate(SIZES):
        dtype = dtypes[i % len(dtypes)]
        tensors = tuple(torch.randn(size, generator=draw).to(dtype) for _ in range(3))
        yield Parameter(str(i), tensors, (), torch.full((size,), torch.nan, dtype=dtype))


def work(function, keys=None):
    return Pass(function, lambda name: torch.tensor([[1.0, 2.0]]) * (int(name) + 1), keys=keys)


def one_by_one(given, pass_, scales):
    """Return what each parameter is by a call of its own, and the tally."""
    outs, tallies = [], []
    for parameter in given:
        out = torch.empty_like(parameter.target)
        done, tally = merge(pass_.function, parameter.operands(pass_), scales[parameter.name], out)
        assert done
        outs.append(out)
        tallies += [] if tally is None else [tally]
    return outs, torch.stack(tallies).sum(0) if tallies else None


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16, torch.float32, torch.float16)], ids=len
)
@pytest.mark.parametrize("is_drawn", [False, True])
def test_each_parameter_is_what_it_is_by_a_call_of_its_own(n_threads, dtypes, is_drawn):
    given = list(parameters(dtypes))
    keys = (lambda name: torch.tensor([int(name), 7])) if is_drawn else None
    pass_ = work(drawn if is_drawn else counted, keys)
    made = NativePass.of(pass_, given)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        for round_ in range(2):
            scales = {parameter.name: 0.5 + round_ * int(parameter.name) for parameter in given}
            outs, wanted = one_by_one(given, pass_, scales)
            done, tally = made.run(pass_, scales)
            assert done
            for parameter, out in zip(given, outs, strict=True):
                assert torch.equal(parameter.target, out)
            assert (tally is None) == is_drawn
            assert is_drawn or torch.equal(tally, wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("n_entries", "n_at_once"),
    [(1 << 26, [4, 4]), (SIZES[2], [2, 2, 4]), (1, [1, 1, 1, 1, 2, 1, 1])],
)
def test_parameters_that_lie_alike_are_one_call_or_a_few(n_entries, n_at_once, monkeypatch):
    monkeypatch.setattr(native_pass, "_ENTRIES", n_entries)
    sizes, of = [], Merges.of

    def counting(function, given, outs):
        sizes.append(len(given))
        return of(function, given, outs)

    monkeypatch.setattr(Merges, "of", counting)
    NativePass.of(work(counted), list(parameters((torch.float32, torch.bfloat16))))
    assert sizes == n_at_once


def test_what_has_gaps_or_is_not_written_as_source_is_left():
    given = list(parameters())
    gaps = given[2]._replace(target=torch.empty(2 * SIZES[2])[::2])
    assert NativePass.of(work(counted), [*given, gaps]) is None
    unwritten = work(lambda chunk: (chunk.deltas[0].cumsum(-1),))
    assert NativePass.of(unwritten, given) is None


def test_the_tensors_stay_in_memory_as_long_as_the_call():
    given = list(parameters())
    pass_ = work(counted)
    outs, _ = one_by_one(given, pass_, dict.fromkeys(map(str, range(len(SIZES))), 1.0))
    made = NativePass.of(pass_, given)
    targets = [parameter.target for parameter in given]
    del given
    _ = [torch.full((n,), 9.0) for n in SIZES for _ in range(20)]  # what was free is taken
    made.run(pass_, dict.fromkeys(map(str, range(len(SIZES))), 1.0))
    assert all(map(torch.equal, targets, outs))

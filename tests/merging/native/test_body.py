"""What a function does is followed, aliases and changes in place included, or refused."""

import pytest
import torch

from searchmerge.merging.chunks import Chunks
from searchmerge.merging.native import native
from searchmerge.merging.native.body import Body, Layout
from searchmerge.merging.native.operations import NoSourceError
from searchmerge.merging.operands import Operands
from tests.merging.compiling import needs_compiler

pytestmark = needs_compiler

REAL = torch.float32
LAYOUT = Layout(REAL, (REAL, REAL, REAL), (REAL,), (2, 3), 3)


def operands(n_entries=100):
    draw = torch.Generator().manual_seed(n_entries)
    tensors = [torch.randn(n_entries, generator=draw) for _ in range(5)]
    scalars = torch.randn(2, 3, generator=draw)
    keys = torch.tensor([3, 2**40 + 1, 2**62])
    return Operands(tensors[0], tuple(tensors[1:4]), scalars, tuple(tensors[4:]), keys, start=7)


def in_place(chunk):
    """One tensor has two names, and is changed by either."""
    first, second = chunk.deltas[0], chunk.deltas[1].clone()
    alias = first.detach()
    alias.mul_(2.0).add_(second)
    kept = first.clone()
    first.sub_(chunk.deltas[2])
    return (kept * 3 + alias, second.float())


def parts_of_scalars(chunk):
    first, *others = chunk.scalars.unbind(1)
    doubled = (chunk.scalars[1] * 2 + chunk.scalars[0].abs())[1:]
    raised = chunk.scalars[0].unsqueeze(0)[0, -1].neg()
    total = chunk.deltas[0] * first[0] + others[1][1]
    return (total * doubled[1] + raised * chunk.deltas[1] * doubled[:1],)


def of_positions(chunk):
    mixed = (chunk.positions ^ chunk.keys[1]) * 3 & 0xFFFF
    later = chunk.keys[2].bitwise_right_shift(32)
    return ((mixed + later).float() + chunk.kept[0],)


@pytest.mark.parametrize("function", [in_place, parts_of_scalars, of_positions])
def test_a_function_is_followed(function):
    found, wanted = native.compute(function, operands()), Chunks().compute(function, operands())
    assert found is not None
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_given_is_not_written_to():
    given = operands()
    before = [tensor.clone() for tensor in (given.base, *given.experts, *given.kept)]
    assert native.compute(in_place, given) is not None
    after = (given.base, *given.experts, *given.kept)
    assert all(map(torch.equal, before, after))


REFUSED = {
    "has an operation erfinv": lambda c: (torch.erfinv(c.deltas[0]),),
    "has an operation stack": lambda c: (torch.stack(c.deltas),),
    "has a select of entries": lambda c: (c.deltas[0] * c.deltas[1][0],),
    r"has a step aten\.item": lambda c: (c.deltas[0] * c.deltas[0].sum().item(),),
    "has mul of a sum over entries": lambda c: (c.deltas[0] * c.deltas[0].sum(),),
    "has a sum of what is the same for all": lambda c: (c.deltas[0] * c.scalars.sum(),),
    r"computes in torch\.bfloat16": lambda c: (c.deltas[0].bfloat16(),),
    r"computes in torch\.int32": lambda c: (c.deltas[0].int() * 2,),
    "has add with a factor": lambda c: (torch.add(c.deltas[0], c.deltas[1], alpha=2),),
    r"returns torch\.float32 of shape \(3,\)": lambda c: (c.scalars[0],),
    r"returns torch\.bool of shape": lambda c: (c.deltas[0] > 0,),
    "something else than a tuple of tensors": lambda c: c.deltas[0] * 2,
    r"AttributeError: .* 'no_such'": lambda c: (c.no_such,),
    "StopIteration": lambda c: (c.deltas[0] * torch.tensor([2.0]),),
    "has mul_ of what is the same for all": lambda c: (
        (c.scalars * 2)[0].mul_(3)[0] * c.deltas[0],
    ),
    "has mul_ in several precisions": lambda c: (c.deltas[0].mul_(c.deltas[1].double()),),
    "has eq of several precisions": lambda c: (
        (c.deltas[0] == c.scalars[0, 0].double() * 0.1).float(),
    ),
    "has bitwise_right_shift by something else": lambda c: ((c.positions >> 64).float(),),
    "has bitwise_left_shift by something else": lambda c: ((c.keys[0] << c.positions).float(),),
    "makes whole numbers of real ones": lambda c: (c.deltas[0].long().float(),),
    "has a conversion that may copy": lambda c: (c.deltas[0].to(torch.float32, copy=True),),
    "has clamp_min with out": lambda c: (torch.clamp_min(c.deltas[0], 0.5, out=c.deltas[1]),),
    "has div with rounding_mode": lambda c: (
        torch.div(c.deltas[0], c.deltas[1], rounding_mode="floor"),
    ),
    r"has a sum in torch\.float64": lambda c: (
        c.deltas[0] * 2,
        c.deltas[0].sum(dtype=torch.float64),
    ),
    r"has exp in torch\.float64": lambda c: (c.deltas[0].double().exp(),),
    "has an operation select_scatter": lambda c: (
        torch.select_scatter(c.deltas[0], c.scalars[0, 0], 0, 1),
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_written_is_refused_with_the_reason(reason):
    body = Body(LAYOUT)
    with pytest.raises(NoSourceError, match=reason):
        [body.number(value) for value in body.follow(REFUSED[reason])]


def test_a_function_whose_flow_depends_on_its_numbers_is_refused():
    def depends(chunk):
        return (chunk.deltas[0] * 2,) if chunk.deltas[0].sum() > 0 else (chunk.deltas[0],)

    with pytest.raises(NoSourceError, match="cannot be followed"):
        Body(LAYOUT).follow(depends)


def chosen(chunk):
    """Whole numbers that are chosen: of numbers, of others that are chosen, of flags, of sums."""
    first, second, third = chunk.deltas
    is_positive, is_small = first > 0, second.abs() < 0.5
    signs = torch.where(is_positive, 1.0, -1.0)
    balance = torch.where(is_small, -7.0, signs)
    count = torch.where(is_positive, 1.0, 0.0) + torch.where(third > 0, 1.0, 0.0)
    counted = torch.where(is_small, count, 0.0)
    flags = torch.where(is_positive, is_small.float(), signs)
    fractions = torch.where(is_small, 0.5, signs)
    return first * 1, *(n.sum(-1) for n in (balance, counted, flags, fractions, signs * 3))


def test_whole_numbers_that_are_chosen_are_counted_without_conversions():
    given = operands(20_000)
    found, wanted = torch.empty(20_000), torch.empty(20_000)
    done, tallies = native.merge(chosen, given, 1.0, found)
    assert done
    expected = Chunks().merge(chosen, given, 1.0, wanted)
    assert torch.equal(tallies, expected.double())
    body = Body(LAYOUT)
    body.follow(chosen)
    summed = [line for line in body.loop if line.startswith("counter")]
    assert ["(int32_t)" in line for line in summed] == [False, True, True, False, True]
    assert list(body.counters.values()) == [True, True, True, False, True]

"""Every operation computes what torch does, of every number there is, NaN and infinity too."""

import pytest
import torch

from searchmerge.merging.native.operations import (
    NoSourceError,
    Value,
    cast,
    literal,
    operand_dtypes,
)
from tests.merging.compiling import needs_compiler
from tests.merging.native.running import applied

pytestmark = needs_compiler

SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 1e-45, -1e-38, 3.4e38, 1e30)
ODD = (float("nan"), float("inf"), float("-inf"))
NUMBERS = torch.tensor([*SPECIAL, *ODD])
PAIRS = torch.cartesian_prod(NUMBERS, NUMBERS)
A, B = (column.repeat(40).contiguous() for column in PAIRS.unbind(1))

ONE = {
    "neg": torch.neg,
    "abs": torch.abs,
    "square": torch.square,
    "sqrt": torch.sqrt,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "relu": torch.relu,
    "sign": torch.sign,
    "logical_not": lambda a: torch.logical_not(a).float(),
    "in integers": lambda a: ((a > 0).long() * -3 >> 1).float(),
    "not in integers": lambda a: (~(a > 0).long()).float(),
    "not of truth": lambda a: (~(a > 0)).float(),
    "clamp": lambda a: a.clamp(-0.75, 2.0),
    "clamp by names": lambda a: a.clamp(min=-0.75, max=2.0),
    "clamp_min": lambda a: a.clamp(min=-0.75),
    "clamp_max": lambda a: a.clamp(max=0.75),
    "clamp_max by name": lambda a: torch.clamp(a, None, 0.75),
    "rsub": lambda a: 3.0 - a,
    "in doubles": lambda a: (a.double() * 1e-30 / 3).float(),
    "likes": lambda a: torch.full_like(a, 2.5) + torch.ones_like(a) * a + torch.zeros_like(a),
    "not a number": lambda a: a.clamp(min=float("nan")),
    "infinite": lambda a: torch.where(a > float("-inf"), float("inf"), float("nan")),
}
TWO = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "clamp": lambda a, b: a.clamp(-b.abs(), b.abs()),
    "clamp within what is chosen": lambda a, b: a.clamp(max=torch.where(b > 0, b, 2)),
    "where": lambda a, b: torch.where(a > b, a, b),
    "where numbers": lambda a, b: torch.where(a >= b, 1.0, -2.0),
    "lt": lambda a, b: (a < b).float(),
    "le": lambda a, b: (a <= b).float(),
    "eq": lambda a, b: (a == b).float(),
    "ne": lambda a, b: (a != b).float(),
    "logical_and": lambda a, b: torch.logical_and(a, b).float(),
    "logical_or": lambda a, b: torch.logical_or(a, b > 0).float(),
    "truths as numbers": lambda a, b: (((a > 0) == 2) | ((a > 0) >= -1) & ((b > 0) != 1)).float(),
    "of truths": lambda a, b: ((a > 0) & (b > 0) | (a < 0) ^ (b < 1)).float(),
}


@pytest.mark.parametrize("name", ONE)
def test_an_operation_on_one_number_is_as_in_torch(name):
    torch.testing.assert_close(applied(ONE[name], A), ONE[name](A), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", TWO)
def test_an_operation_on_two_numbers_is_as_in_torch(name):
    found, wanted = applied(TWO[name], A, B), TWO[name](A, B)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", [torch.exp, torch.tanh])
def test_functions_are_right_to_some_units_in_the_last_place(function):
    numbers = torch.cat([torch.linspace(-100, 100, 100_001), torch.logspace(-40, 2, 10_001)])
    exact = function(numbers.double())
    found = applied(function, numbers)
    normal = (exact > 1e-37) & exact.float().isfinite()
    off = ((found.double() - exact) / exact)[normal].abs().max()
    assert off < 4 * torch.finfo(torch.float32).eps
    assert function(A).isnan().equal(applied(function, A).isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [0.1, -3, 1e-45, 1e39, float("nan")])
def test_a_number_is_written_exactly(number, dtype):
    text = literal(number, dtype)
    exact = torch.tensor(number, dtype=dtype).item()
    if exact == exact and abs(exact) != float("inf"):
        assert float.fromhex(text.strip("()").removesuffix("f")) == exact
    else:
        assert "nan" in text or "inf" in text


def test_what_is_no_whole_number_is_refused_among_them():
    assert literal(2**32, torch.int64) == "INT64_C(4294967296)"
    with pytest.raises(NoSourceError, match=r"has a whole number 0\.5"):
        literal(0.5, torch.int64)
    with pytest.raises(NoSourceError, match=r"computes in torch\.int8"):
        literal(1, torch.int8)


def test_an_operation_that_is_not_written_here_is_refused_by_name():
    with pytest.raises(NoSourceError, match="has an operation erfinv"):
        operand_dtypes("erfinv", torch.float32, [Value("a", torch.float32)])
    with pytest.raises(NoSourceError, match=r"has exp in torch\.float64"):
        operand_dtypes("exp", torch.float64, [Value("a", torch.float64)])
    with pytest.raises(NoSourceError, match=r"has div in torch\.int64"):
        operand_dtypes("div", torch.int64, [Value("a", torch.int64), 2])
    with pytest.raises(NoSourceError, match=r"computes in torch\.int8"):
        cast("a", torch.float32, torch.int8)

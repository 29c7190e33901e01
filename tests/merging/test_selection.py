"""Selected numbers are those of a sort, whatever a sample suggests and however little is kept."""

import numpy as np
import pytest
import torch

from searchmerge.merging.counting import Part, count, n_runs
from searchmerge.merging.selection import AT_ONCE, Room, select

N = 20_000
SMALL = Room(most=9000, in_all=18_000, least=6400, share=50)
"""So little room that what is collected has to be narrowed down."""

TINY = Room(most=200, in_all=400, least=130, share=50)
"""So little that two ranks are narrowed down at once."""


def drawn(kind):
    """Return two rows of numbers of some kind, ``(2, N)`` float32."""
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, N, generator=draw)
    match kind:
        case "16-bit":  # most numbers tie
            base = numbers.mul(0.02).bfloat16()
            expert = (base + 1e-3 * torch.randn(2, N, generator=draw)).bfloat16()
            return (expert.float() - base.float()).abs()
        case "mostly zero":
            return numbers * (torch.rand(2, N, generator=draw) > 0.9)
        case "of two scales":  # whole runs are alike
            return numbers * torch.tensor([1e-6, 1.0]).repeat_interleave(N // 2)
        case "in order":
            return numbers.sort().values
        case "equal":
            return torch.full((2, N), -0.25)
        case "from the smallest to the largest":
            exponents = torch.randint(-126, 127, (2, N), generator=draw)
            return torch.ldexp(numbers, exponents).clamp(-3e38, 3e38)
        case "subnormal":
            return torch.randint(-5, 6, (2, N), generator=draw) * 1e-45
    return numbers


KINDS = [
    "normal",
    "16-bit",
    "mostly zero",
    "of two scales",
    "in order",
    "equal",
    "from the smallest to the largest",
    "subnormal",
]


def counted(rows, *, size=3000, count=count):
    """Return what goes over rows in blocks of ``size``, and the list of its passes."""
    passes = []

    def count_all(counters_on):
        passes.append(1)
        first_run = 0
        for start in range(0, rows.shape[1], size):
            part = rows[:, start : start + size]
            count([Part(list(part), first_run=first_run)], counters_on(part.device))
            first_run += n_runs(part.shape[1])

    return count_all, passes


def sorted_at(row, ranks):
    ordered = np.sort(row.numpy())
    return {rank: float(ordered[rank]) for rank in ranks}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [Room(), SMALL], ids=["all at once", "narrowed down"])
def test_a_grid_of_ranks_is_that_of_a_sort(kind, room):
    rows = drawn(kind)
    ranks = sorted({0, N - 1, *(N * step // 100 for step in range(100))})
    count_all, passes = counted(rows)
    values = select(count_all, N, [ranks, ranks], room)
    assert values == [sorted_at(row, ranks) for row in rows]
    assert len(passes) <= (1 if room != SMALL else 10)


def test_few_passes_find_a_grid_where_a_tenth_has_room():
    rows = torch.randn(1, 400_000, generator=torch.Generator().manual_seed(1))
    ranks = [4000 * step for step in range(100)]
    count_all, passes = counted(rows, size=1 << 16)
    values = select(count_all, 400_000, [ranks], Room(40_000, 40_000, 20_000, 1))
    assert values == [sorted_at(rows[0], ranks)]
    assert len(passes) <= 6


def test_each_row_has_its_ranks_and_none_may_be_asked_for():
    rows = drawn("normal")
    count_all, _ = counted(rows)
    values = select(count_all, N, [[], [7, 12_345]], TINY)
    assert values == [{}, sorted_at(rows[1], [7, 12_345])]


def test_more_ranks_than_are_narrowed_down_at_once_are_found_too():
    rows = drawn("normal")
    ranks = list(range(0, N, N // (2 * AT_ONCE)))
    values = select(counted(rows)[0], N, [ranks, [3]], SMALL)
    assert len(ranks) > 2 * AT_ONCE
    assert values == [sorted_at(rows[0], ranks), sorted_at(rows[1], [3])]


@pytest.mark.parametrize("kind", ["normal", "of two scales", "mostly zero", "16-bit"])
def test_a_sample_that_misleads_costs_passes_and_changes_nothing(kind):
    """Of what is drawn only the smallest keys are there."""
    rows = drawn(kind)

    def misled(parts, counters):
        count(parts, counters)
        for row, limit in enumerate(counters.limits.tolist()):
            if limit < 1 << 24:
                collected = counters.keys(row)
                collected.copy_(collected.min().expand(len(collected)) if len(collected) else 0)

    ranks = [0, N // 3, N // 2, N - 1]
    values = select(counted(rows, count=misled)[0], N, [ranks, ranks], TINY)
    for of_row, row in zip(values, rows, strict=True):
        assert of_row == sorted_at(row, ranks)


def test_where_nothing_is_drawn_what_is_left_is_halved():
    rows = drawn("normal")

    def misled(parts, counters):
        count(parts, counters)
        if int(counters.limits.max()) < 1 << 24 and counters.has_cuts:
            counters.n_collected.zero_()

    values = select(counted(rows, count=misled)[0], N, [[N // 2], [5]], TINY)
    assert values == [sorted_at(rows[0], [N // 2]), sorted_at(rows[1], [5])]


def test_numbers_on_several_devices_are_counted_together():
    rows = drawn("normal")
    names = iter(range(10_000))

    def count_all(counters_on):
        for start in range(0, N, 5000):
            # devices of other names, whose counters are here all the same
            counters = counters_on(torch.device("cpu", next(names) % 2))
            count([Part(list(rows[:, start : start + 5000]), first_run=start // 32)], counters)

    values = select(count_all, N, [[100, N - 2], [N // 2]], TINY)
    assert values == [sorted_at(rows[0], [100, N - 2]), sorted_at(rows[1], [N // 2])]

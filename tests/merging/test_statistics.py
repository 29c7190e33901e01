"""Order statistics are those of a sort, whatever the numbers are."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file

from searchmerge.merging import statistics
from searchmerge.merging.counting import Part, count
from searchmerge.merging.engine import Engine
from searchmerge.merging.measure import Measure, MemoryBudget
from searchmerge.merging.statistics import Block, OrderStatistics
from searchmerge.merging.task_vectors import TaskVectors

ODD = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 1.0 + 2**-23, 3.4e38, -3.4e38, 0.5]
NUMBERS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 200)),
    elements=st.one_of(
        st.sampled_from(ODD),
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
    ),
)


def statistics_of(rows, *, size=7, **more):
    """Measure ``rows`` in blocks of ``size``; count how often they are gone through."""
    rows = torch.as_tensor(rows)
    passes = []

    def numbers():
        passes.append(1)
        for start in range(0, rows.shape[1], size):
            part = rows[:, start : start + size]
            yield Block(part.shape[1], [own.__getitem__ for own in part])

    return OrderStatistics(numbers, len(rows), rows.shape[1], **more), passes


@settings(max_examples=150, deadline=None)
@given(NUMBERS, st.data())
def test_every_rank_is_that_of_a_sort(rows, data):
    n_rows, n_numbers = rows.shape
    ranks = data.draw(st.lists(st.integers(0, n_numbers - 1), min_size=n_rows, max_size=n_rows))
    grid = data.draw(st.lists(st.integers(0, n_numbers - 1), max_size=5))
    statistics, _ = statistics_of(rows, grid=grid)
    expected = [float(np.sort(own)[rank]) for own, rank in zip(rows, ranks, strict=True)]
    assert statistics.at(ranks) == expected
    for rank in grid:
        assert statistics.at([rank] * n_rows) == [float(np.sort(own)[rank]) for own in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_magnitudes_of_many_equal_numbers_are_those_of_kthvalue(dtype):
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(40_000, generator=draw).mul_(0.02).to(dtype)
    expert = (base + torch.randn(40_000, generator=draw) * 1e-4).to(dtype)
    sizes = (expert.float() - base.float()).abs()
    ranks = [len(sizes) - 1 - int(len(sizes) * step / 100) for step in range(100)]
    statistics, passes = statistics_of(sizes[None], size=17_000, grid=ranks)
    found = [statistics.at([rank])[0] for rank in ranks]
    assert found == [sizes.kthvalue(rank + 1).values.item() for rank in ranks]
    assert len(passes) == 2  # the whole grid in two passes


def test_a_rank_off_the_grid_takes_one_more_pass_and_is_then_known():
    statistics, passes = statistics_of(torch.randn(2, 500), grid=[10, 20])
    statistics.at([10, 20])
    statistics.at([33, 20])
    assert len(passes) == 3
    statistics.at([33, 10])
    assert len(passes) == 3


def test_rows_can_be_asked_for_alone_and_ranks_are_clamped():
    rows = torch.tensor([[3.0, 1.0, 2.0], [30.0, 10.0, 20.0]])
    statistics, _ = statistics_of(rows)
    assert statistics.at([2], rows=[1]) == [30.0]
    assert statistics.at([-5, 99]) == [1.0, 30.0]


def selected(rows, *, size=7, **more):
    """Return statistics of ``rows`` as they are measured where numbers are on a GPU."""
    rows = torch.as_tensor(rows)

    def numbers():
        for start in range(0, rows.shape[1], size):
            part = rows[:, start : start + size]
            yield Block(part.shape[1], [own.__getitem__ for own in part])

    return OrderStatistics(numbers, len(rows), rows.shape[1], on_gpu=True, **more)


@settings(max_examples=50, deadline=None)
@given(NUMBERS, st.data())
def test_ranks_are_selected_on_a_gpu_as_they_are_counted_on_a_cpu(rows, data):
    n_rows, n_numbers = rows.shape
    ranks = data.draw(st.lists(st.integers(0, n_numbers - 1), min_size=n_rows, max_size=n_rows))
    size = data.draw(st.sampled_from([7, 70, 300]))
    grid = data.draw(st.lists(st.integers(0, n_numbers - 1), max_size=5))
    there, here = selected(rows, size=size, grid=grid), statistics_of(rows, grid=grid)[0]
    assert there.at(ranks) == here.at(ranks)
    assert [there.at([rank] * n_rows) for rank in grid] == [here.at([r] * n_rows) for r in grid]


@pytest.mark.parametrize(
    ("most", "is_view", "together"),
    [
        (1 << 26, False, [[0, 4]]),
        (800, False, [[0], [4]]),
        (1, False, [[0], [4]]),
        (1, True, [[0, 4]]),
    ],
)
def test_blocks_are_counted_where_they_are_as_many_at_once_as_may_be(
    most, is_view, together, monkeypatch
):
    rows, counted = torch.randn(2, 100), []

    def noted(parts, counters):
        counted.append([part.first_run for part in parts])
        count(parts, counters)

    monkeypatch.setattr(statistics, "count", noted)
    monkeypatch.setattr(statistics, "_MOST_WAITING", most - 1)
    part = Part(list(rows))
    blocks = [
        Block(100, [], part, is_view=is_view),
        Block(100, [own.__getitem__ for own in rows], is_view=is_view),
    ]
    there = OrderStatistics(lambda: blocks, 2, 200, on_gpu=True)
    twice = torch.cat([rows, rows], 1).sort().values
    assert there.at([3, 70]) == [twice[0, 3].item(), twice[1, 70].item()]
    assert counted == together


def test_no_numbers_at_all_give_zeros():
    assert statistics_of(torch.empty(2, 0))[0].at([0, 0]) == [0.0, 0.0]


def test_what_was_cached_is_not_measured_again(tmp_path):
    rows, file = torch.randn(2, 3000), tmp_path / "some" / "statistics.safetensors"
    first, _ = statistics_of(rows, grid=[5, 2999], cache=file)
    found = first.at([5, 2999])
    again, passes = statistics_of(rows, grid=[5, 2999], cache=file)
    assert again.at([5, 2999]) == found
    assert passes == []
    assert again.at([77, 78]) == [rows[i].sort().values[77 + i].item() for i in range(2)]
    assert len(passes) == 1
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_was_selected_and_cached_is_not_measured_again(tmp_path):
    rows, file = torch.randn(2, 300), tmp_path / "statistics.safetensors"
    wanted = selected(rows, cache=file).at([5, 299])
    again, passes = statistics_of(rows, cache=file)
    assert again.at([5, 299]) == wanted
    assert passes == []
    assert again.at([6, 7]) == [rows[i].sort().values[6 + i].item() for i in range(2)]
    assert len(passes) == 2


@pytest.mark.parametrize("damage", ["cut", "text", "other", "flip", "unsigned"])
def test_a_cache_that_cannot_be_used_is_measured_anew(tmp_path, caplog, damage):
    rows, file = torch.randn(2, 300), tmp_path / "statistics.safetensors"
    if damage == "text":
        file.write_text("not at all")
    else:
        other = torch.randn(2, 299) if damage == "other" else rows
        statistics_of(other, cache=file)[0].at([5, 6])
        data = file.read_bytes()
        if damage == "cut":
            file.write_bytes(data[:-100])
        if damage == "flip":  # the values come last: one of them is another number now
            file.write_bytes(data[:-2] + bytes([data[-2] ^ 32]) + data[-1:])
        if damage == "unsigned":
            save_file(load_file(file), file)
    with caplog.at_level(logging.WARNING):
        statistics, passes = statistics_of(rows, cache=file)
        assert statistics.at([5, 6]) == [rows[i].sort().values[5 + i].item() for i in range(2)]
    assert len(passes) == 2
    assert "measured anew" in caplog.text
    assert statistics_of(rows, cache=file)[0].at([5, 6]) == statistics.at([5, 6])


def test_an_error_while_counting_is_raised():
    def fail(_):
        raise RuntimeError("no")

    statistics = OrderStatistics(lambda: [Block(3, [fail])], 1, 3)
    with pytest.raises(RuntimeError, match="no"):
        statistics.at([0])


def test_parameters_are_measured_where_they_are_merged_wherever_they_lie():
    """As on a GPU whose experts are streamed; the meta device is as far from the CPU."""
    base = {"fc.weight": torch.ones(3, 4)}
    vectors = TaskVectors.from_weights(base, {"math": {"fc.weight": torch.zeros(3, 4)}})
    there = {"fc.weight": torch.device("meta")}
    measure = Measure(vectors, Engine("eager"), MemoryBudget(1000), devices=there)
    ((_, part),) = measure.parts()
    assert {tensor.device.type for tensor in (part.base, *part.experts)} == {"meta"}
    kept = measure.keep(lambda name, part: (part.base,), 1)
    assert kept["fc.weight"][0].device.type == "meta"
    assert measure.deltas("fc.weight")[0].device.type == "meta"
    here = Measure(vectors, Engine("eager"), MemoryBudget(0))
    assert next(here.parts())[1].base.device.type == "cpu"

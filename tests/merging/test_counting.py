"""Keys order as numbers do, and are counted between cuts."""

import contextlib
import sys
import types

import numpy as np
import torch

from searchmerge.merging import counting
from searchmerge.merging.counting import (
    MOST_CUTS,
    RUN,
    Part,
    Wanted,
    count,
    keys_of,
    n_runs,
    new_counters,
    numbers_of,
)

CPU = torch.device("cpu")
NUMBERS = [-3.4e38, -1.0, -1e-38, -1e-45, 0.0, 1e-45, 1.0, 1.0 + 2**-23, 3.4e38]


def wanted(cuts, collects=(), every=1):
    collected = np.zeros(len(cuts) + 1, np.bool_)
    collected[list(collects)] = True
    return Wanted(np.array(cuts, np.int64), collected, every)


def key(number):
    return int(keys_of(torch.tensor([number])))


def test_keys_order_as_numbers_do_and_lead_back():
    numbers = torch.tensor(NUMBERS)
    keys = keys_of(numbers)
    assert (keys.diff() > 0).all()
    assert torch.equal(numbers_of(keys.long()), numbers)
    assert key(-0.0) == key(0.0) == 0


def test_numbers_are_counted_between_cuts_and_collected_where_it_is_wanted():
    rows = torch.tensor([[0.5, 2.0, 1.0, -1.0, 3.0], [7.0, 7.0, 8.0, 0.0, 7.0]])
    of_rows = [wanted([key(0.0), key(1.0), key(2.5)], [2]), wanted([key(7.0), key(7.0) + 1], [0])]
    counters = new_counters(of_rows, 10, CPU)
    count([Part(list(rows))], counters)
    assert counters.counts[0, :4].tolist() == [1, 1, 2, 1]
    assert counters.counts[1, :3].tolist() == [1, 3, 1]
    assert sorted(counters.keys(0).tolist()) == [key(1.0), key(2.0)]
    assert counters.keys(1).tolist() == [key(0.0)]


def test_magnitudes_are_those_of_differences_in_float32():
    base = torch.tensor([1.0, 1.0, -2.0], dtype=torch.bfloat16)
    expert = torch.tensor([1.0, 1.0078125, 2.0], dtype=torch.bfloat16)
    counters = new_counters([wanted([], [0])], 10, CPU)
    count([Part([expert], base)], counters)
    assert numbers_of(counters.keys(0).long()).tolist() == [0.0, 0.0078125, 4.0]


def test_what_there_is_no_room_for_is_counted_all_the_same():
    counters = new_counters([wanted([0], [0, 1])], 3, CPU)
    count([Part([torch.tensor([1.0, -1.0, 2.0, 3.0])])], counters)
    assert counters.counts[0, :2].tolist() == [1, 3]
    assert counters.keys(0).tolist() == [key(1.0), key(-1.0), key(2.0)]
    assert counters.n_collected.tolist() == [4]


def test_runs_are_drawn_evenly_and_whole_and_by_their_place_among_all():
    numbers = torch.arange(100 * RUN, dtype=torch.float32)
    counters = new_counters([wanted([], [0], every=4)], len(numbers), CPU)
    count([Part([numbers])], counters)
    drawn = numbers_of(counters.keys(0).long()).int() // RUN
    runs, sizes = drawn.unique(return_counts=True)
    assert set(sizes.tolist()) == {RUN}
    assert 23 <= len(runs) <= 27
    apart = new_counters([wanted([], [0], every=4)], len(numbers), CPU)
    count([Part([numbers[: 40 * RUN]])], apart)
    count([Part([numbers[40 * RUN :]], first_run=40)], apart)
    assert torch.equal(apart.keys(0), counters.keys(0))


def test_the_last_run_may_be_short():
    assert [n_runs(n) for n in (0, 1, RUN, RUN + 1)] == [0, 1, 1, 2]


def test_as_many_cuts_as_there_can_be_side_by_side_are_told_apart():
    cuts = [key(1.0) + i for i in range(MOST_CUTS)]
    counters = new_counters([wanted(cuts)], 1, CPU)
    numbers = numbers_of(torch.arange(key(1.0) - 3, key(1.0) + 300))
    count([Part([numbers])], counters)
    assert counters.counts[0].tolist() == [3, *[1] * (MOST_CUTS - 1), 300 - MOST_CUTS + 1, 0]


def test_what_a_kernel_counted_before_it_failed_is_not_counted_twice(monkeypatch, caplog):
    """A stand-in for Triton's: it counts the first part, and fails at the second."""
    module = types.ModuleType("searchmerge.merging.counting_kernel")

    def fails(parts, counters):
        counting._count_by_operations(parts[0], counters)
        raise RuntimeError("no such kernel")

    module.count = fails
    monkeypatch.setitem(sys.modules, "searchmerge.merging.counting_kernel", module)
    monkeypatch.setattr("searchmerge.merging.counting_kernel", module, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(counting._Kernel, "_is_for", lambda self, device: True)
    kernel = counting._Kernel()
    numbers = torch.arange(200.0)
    parts = [Part([numbers[:100]]), Part([numbers[100:]], first_run=4)]
    counters = new_counters([wanted([key(50.0)], [0, 1])], 200, CPU)
    assert not kernel.count(parts, counters)
    assert "statistics take longer, as compiling failed: no such kernel" in caplog.text
    count(parts, counters)
    assert counters.counts[0, :2].tolist() == [50, 150]
    assert sorted(counters.keys(0).tolist()) == sorted(keys_of(numbers).tolist())
    assert not kernel.count(parts, counters)  # nor is it asked again

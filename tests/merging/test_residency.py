"""Base and experts lie where they were asked to."""

from pathlib import Path

import psutil
import pytest
import torch

from searchmerge.merging.residency import Memory, free_bytes, place, streamed
from searchmerge.merging.task_vectors import TaskVectors

CPU = torch.device("cpu")


def vectors():
    base = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    return TaskVectors.from_weights(base, {"x": {"a": torch.ones(2, 3), "b": torch.ones(4)}})


def test_free_memory_is_what_the_machine_and_its_control_group_leave():
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/limit_in_bytes")]
    is_limited = any(file.exists() and file.read_text().strip() != "max" for file in limits)
    available = psutil.virtual_memory().available
    found = free_bytes(CPU)
    assert found <= 1.2 * available
    assert is_limited or found >= 0.8 * available


def test_methods_keep_what_they_are_told_or_half_of_what_is_free():
    assert Memory(keep_bytes=5).budget_bytes(CPU) == 5
    assert Memory().budget_bytes(CPU) == pytest.approx(free_bytes(CPU) / 2, rel=0.2)


@pytest.mark.parametrize("residency", ["auto", "device", "mapped"])
def test_what_lies_where_it_is_merged_is_not_copied(residency):
    own = vectors()
    placed = place(own, dict.fromkeys(own.weights, CPU), residency)
    for name in own.weights:
        assert placed.base[name] is own.base[name]
        assert placed.weights[name][0] is own.weights[name][0]


def test_parameters_come_in_order_and_as_they_are_read():
    read = {name: (torch.full((2,), i), torch.zeros(2)) for i, name in enumerate("cab")}
    found = list(streamed(list(read), read.__getitem__, dict.fromkeys(read, CPU)))
    assert [name for name, _ in found] == list("cab")
    for name, tensors in found:
        assert all(torch.equal(t, own) for t, own in zip(tensors, read[name], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("residency", ["auto", "device", "pinned", "mapped"])
def test_a_gpu_is_sent_each_parameter_wherever_it_lies(residency):
    own, device = vectors(), torch.device("cuda", 0)
    devices = dict.fromkeys(own.weights, device)
    placed = place(own, devices, residency)
    assert (placed.base["a"].device == device) == (residency in ("auto", "device"))
    assert placed.base["a"].is_pinned() == (residency == "pinned")

    def read(name):
        return (placed.base[name].flatten(), placed.weights[name][0].flatten())

    for name, tensors in streamed(list(devices), read, devices):
        assert [t.device for t in tensors] == [device] * 2
        assert torch.equal(tensors[1].cpu(), own.weights[name][0].flatten())

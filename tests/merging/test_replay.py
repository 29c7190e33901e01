"""A pass over a resident model is launched, then recorded, then played."""

import logging

import pytest
import torch

from searchmerge.merging.compiled import Compiled
from searchmerge.merging.engine import Engine
from searchmerge.merging.measure import Measure, MemoryBudget
from searchmerge.merging.method import METHODS, default_plan
from searchmerge.merging.operands import Operands, Parameter
from searchmerge.merging.replay import RecordedPass
from searchmerge.merging.task_vectors import TaskVectors

EXPERTS = ("math", "code", "law")
SIZES = {"embed": (40, 8), "layers.0.w": (96,), "layers.1.w": (65,), "norm": (7,), "scale": ()}


class Uncompiled(Compiled):
    """Runs kernels of rows as they are, on a CPU; as many as it is told, or all."""

    def __init__(self, n_kernels=None):
        super().__init__()
        self.n_launched, self.n_kernels = 0, n_kernels

    def run_rows(self, kernel, function, rows, outs):
        if self.n_launched == self.n_kernels:
            return False
        self.n_launched += 1
        kernel(function, rows, *outs)
        return True


def uncompiled(n_kernels=None):
    engine = Engine("eager")
    engine.compiled = Uncompiled(n_kernels)
    return engine


class Recorder:
    """Records by doing, as a graph does: what is played is the same launches again."""

    def __init__(self, fails=False):
        self.fails, self.n_recorded, self.n_played = fails, 0, 0

    def __call__(self, launch):
        self.n_recorded += 1
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def play():
            self.n_played += 1
            launch()

        return play


def vectors():
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(size, generator=draw) for name, size in SIZES.items()}
    experts = {
        e: {k: t + 0.1 * torch.randn(t.shape, generator=draw) for k, t in base.items()}
        for e in EXPERTS
    }
    return TaskVectors.from_weights(base, experts)


def parameters(own, targets, work):
    for name in own.weights:
        experts = own.weights[name]
        chosen = experts if work.experts is None else [experts[i] for i in work.experts]
        tensors = tuple(tensor.reshape(-1) for tensor in (own.base[name], *chosen))
        yield Parameter(name, tensors, work.kept.get(name, ()), targets[name].view(-1))


def settings(method):
    return {"election": "ties"} if method in ("dare", "della") else {}


def expected(own, work, scales):
    """Return each parameter merged by itself, chunk by chunk, and the tally."""
    merged, tallies, engine = {}, [], Engine("eager")
    for name, size in SIZES.items():
        out = torch.empty(size)
        [parameter] = [p for p in parameters(own, {**own.base, name: out}, work) if p.name == name]
        base, *experts = parameter.tensors
        keys = work.keys(name) if work.keys else None
        operands = Operands(base, tuple(experts), work.scalars(name), parameter.kept, keys)
        tallies.append(engine.merge(work.function, operands, scales[name], out.view(-1)))
        merged[name] = out
    return merged, None if tallies[0] is None else torch.stack(tallies).sum(0)


@pytest.mark.parametrize("method", METHODS)
def test_every_run_gives_what_each_parameter_gives_by_itself(method):
    own = vectors()
    bound = METHODS[method](Measure(own, Engine("eager"), MemoryBudget(2**20)))
    targets = {name: torch.empty(size) for name, size in SIZES.items()}
    recorder, engine, passes, kept = Recorder(), uncompiled(), None, None
    for i, coefficient in enumerate([0.5, 1.0, 1.5]):
        plan = default_plan(method, EXPERTS, coefficient=coefficient, **settings(method))
        work = bound.bind(plan)
        scales = {name: 1.0 + i * place for place, name in enumerate(SIZES)}
        wanted, tally = expected(own, work, scales)
        if passes is None or work.kept is not kept:
            passes = RecordedPass(engine, work, list(parameters(own, targets, work)), recorder)
        kept = work.kept
        done, found = passes.run(work, scales)
        assert done
        assert all(torch.equal(targets[name], tensor) for name, tensor in wanted.items())
        assert (found is None) == (tally is None)
        assert found is None or torch.equal(found, tally.double())


def ties_pass(engine, recorder):
    own = vectors()
    targets = {name: torch.empty(size) for name, size in SIZES.items()}
    bound = METHODS["ties"](Measure(own, Engine("eager"), MemoryBudget(0)))
    work = bound.bind(default_plan("ties", EXPERTS))
    return RecordedPass(engine, work, list(parameters(own, targets, work)), recorder), work


def test_it_is_launched_once_recorded_once_and_then_played():
    recorder = Recorder()
    passes, work = ties_pass(uncompiled(), recorder)
    played = []
    for _ in range(4):
        passes.run(work, dict.fromkeys(SIZES, 1.0))
        played.append(recorder.n_played)
    assert played == [0, 1, 2, 3]
    assert recorder.n_recorded == 1


def test_where_recording_fails_each_kernel_is_launched_and_it_is_said_once(caplog):
    recorder, engine = Recorder(fails=True), uncompiled()
    passes, work = ties_pass(engine, recorder)
    with caplog.at_level(logging.INFO, logger="searchmerge"):
        tallies = [passes.run(work, dict.fromkeys(SIZES, 1.0))[1].tolist() for _ in range(4)]
    assert tallies == [tallies[0]] * 4
    assert engine.compiled.n_launched == 4 * 3  # three parameters have two rows or more
    assert [record.message for record in caplog.records] == [
        "each kernel is launched by itself, as recording failed: operation not permitted when "
        "stream is capturing"
    ]


def test_what_cannot_be_compiled_is_told():
    passes, work = ties_pass(uncompiled(n_kernels=1), Recorder())
    assert passes.run(work, dict.fromkeys(SIZES, 1.0)) == (False, None)

"""All parameters that stay where they are merged are merged by one call, prepared once."""

import weakref
from types import MappingProxyType

import pytest
import torch

from searchmerge.merging import at_once as module
from searchmerge.merging.at_once import AtOnce
from searchmerge.merging.engine import Engine
from searchmerge.merging.merger import Merger
from searchmerge.merging.method import METHODS, Pass, default_plan
from searchmerge.merging.native.native import Merges
from searchmerge.merging.task_vectors import TaskVectors
from tests.merging.compiling import needs_compiler

EXPERTS = ("math", "code", "law")
SIZES = {"embed": (40, 8), "layers.0.w": (96, 70), "layers.1.w": (65,), "norm": (7,), "scale": ()}


def vectors(dtype=torch.bfloat16, norm=torch.float32):
    draw = torch.Generator().manual_seed(0)
    dtypes = {name: norm if name == "norm" else dtype for name in SIZES}
    base = {name: torch.randn(size, generator=draw) for name, size in SIZES.items()}
    experts = {
        e: {
            k: (t + 0.1 * torch.randn(t.shape, generator=draw)).to(dtypes[k])
            for k, t in base.items()
        }
        for e in EXPERTS
    }
    return TaskVectors.from_weights({k: t.to(dtypes[k]) for k, t in base.items()}, experts)


def merger(own, **settings):
    targets = {name: torch.full_like(tensor, torch.nan) for name, tensor in own.base.items()}
    return Merger(own, targets=targets, **settings), targets


class Alone(Engine):
    """Refuses to merge a parameter by itself."""

    def merge(self, *_):
        raise AssertionError("a parameter was merged by itself")


def plans(method):
    linear = "coefficient" in {h.name for h in METHODS[method].hyperparameters}
    for coefficient in (0.5, 1.0, 1.5):
        yield default_plan(
            method,
            EXPERTS,
            depth_slope=coefficient - 1,
            **({"coefficient": coefficient} if linear else {}),
        )


@needs_compiler
@pytest.mark.parametrize("method", sorted(METHODS))
def test_it_writes_what_each_parameter_gives_by_itself(method):
    own = vectors()
    at_once, targets = merger(own)
    by_itself, others = merger(own)
    by_itself._at_once.run = lambda *_: None
    for plan in plans(method):
        at_once.apply(plan)
        by_itself.apply(plan)
        for name, wanted in others.items():
            assert torch.equal(targets[name], wanted), name
            assert wanted.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare", "linear", "breadcrumbs"])
def test_no_candidate_takes_parameters_one_by_one_or_is_prepared_anew(method, monkeypatch):
    made, of = [], Merges.of
    monkeypatch.setattr(Merges, "of", lambda *given: made.append(given) or of(*given))
    own = vectors()
    candidate, targets = merger(own)
    candidate._engine.__class__ = Alone
    first, *others = plans(method)
    candidate.apply(first)
    n_made = len(made)
    assert n_made >= 2  # the norm has another dtype
    for plan in others:
        candidate.apply(plan)
    assert len(made) == n_made
    wanted = dict(Merger(own).merged(plan))
    assert all(torch.equal(targets[name], wanted[name]) for name in SIZES)


@needs_compiler
def test_some_of_the_experts_are_prepared_apart():
    own = vectors()
    candidate, targets = merger(own)
    for experts in (EXPERTS, EXPERTS[1:], EXPERTS):
        plan = default_plan("ties", experts)
        candidate.apply(plan)
        wanted = dict(Merger(own).merged(plan))
        assert all(torch.equal(targets[name], wanted[name]) for name in SIZES)


@needs_compiler
def test_the_functions_that_were_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(module, "_MOST_KEPT", 2)
    made, of = [], Merges.of
    monkeypatch.setattr(Merges, "of", lambda *given: made.append(given[0]) or of(*given))
    candidate, _ = merger(vectors(norm=torch.bfloat16))
    for method in ("ties", "linear", "ties", "breadcrumbs", "ties", "linear"):
        candidate.apply(default_plan(method, EXPERTS))
    assert len(candidate._at_once._prepared) == 2
    ties, linear, breadcrumbs, again = made
    assert linear is again
    assert len({ties, linear, breadcrumbs}) == 3


def add_kept(chunk):
    return (chunk.deltas[0] + chunk.kept[0],)


@needs_compiler
def test_what_a_method_keeps_is_read_where_it_lies_now():
    own = vectors(torch.float32)
    targets = {"norm": torch.empty(7)}
    inputs = [("norm", (own.base["norm"], own.weights["norm"][0]))]
    at_once = AtOnce(Engine("auto"), targets)
    for number in (1.0, 2.0):
        kept = {"norm": (torch.full((7,), number),)}
        work = Pass(add_kept, lambda _: torch.zeros(1, 1), kept=kept)
        assert at_once.run(EXPERTS, work, inputs, {"norm": 1.0}) == [None]
        torch.testing.assert_close(targets["norm"], own.weights["norm"][0] + number)


@needs_compiler
@pytest.mark.parametrize("moved", ["targets", "experts"])
def test_what_has_moved_in_memory_since_is_read_and_written_where_it_lies_now(moved):
    """A model that another process scores too is moved to memory that both of them have."""
    own = vectors()
    candidate, targets = merger(own)
    for plan in plans("ties"):
        candidate.apply(plan)
        wanted = dict(Merger(own).merged(plan))
        assert all(torch.equal(targets[name], wanted[name]) for name in SIZES)
        for name in SIZES:
            for tensor in [targets[name]] if moved == "targets" else own.weights[name]:
                tensor.share_memory_()


def scaled(chunk):
    return (sum(chunk.deltas[0] * row[0] for row in chunk.scalars.unbind()),)


@needs_compiler
def test_numbers_of_another_shape_are_prepared_apart():
    own = vectors(torch.float32)
    targets = {"norm": torch.empty(7)}
    inputs = [("norm", (own.base["norm"], own.weights["norm"][0]))]
    at_once = AtOnce(Engine("auto"), targets)
    for n_scalars in (1, 3, 1):
        work = Pass(scaled, lambda _, n=n_scalars: torch.ones(n, 1))
        done = at_once.run(EXPERTS, work, inputs, {"norm": 1.0})
        wanted = own.base["norm"] + n_scalars * (own.weights["norm"][0] - own.base["norm"])
        assert done == [None]
        torch.testing.assert_close(targets["norm"], wanted)


@pytest.mark.parametrize("reason", ["", "computed", "gaps", "eager", "elsewhere"])
@needs_compiler
def test_what_cannot_be_prepared_is_left(reason):
    own = vectors(torch.float32)
    target = torch.empty(14)[::2] if reason == "gaps" else torch.empty(7)
    at_once = AtOnce(Engine("eager" if reason == "eager" else "auto"), {"norm": target})
    device = "meta" if reason == "elsewhere" else "cpu"
    kept = {"norm": (torch.zeros(7, device=device),)}
    work = Pass(
        add_kept,
        lambda _: torch.zeros(1, 1),
        kept=MappingProxyType(kept) if reason == "computed" else kept,
    )
    inputs = [("norm", (own.base["norm"], own.weights["norm"][0]))]
    done = at_once.run(EXPERTS, work, inputs, {"norm": 1.0})
    assert done == (None if reason else [None])


@needs_compiler
def test_memory_that_a_method_gives_back_is_free_before_it_keeps_more():
    candidate, _ = merger(vectors())
    shares = []

    def is_held():
        return any(share() is not None for share in shares)

    for density in (0.1, 0.1, 0.2):
        candidate.apply(default_plan("pcb", EXPERTS, density=density))
        kept = candidate._methods["pcb", EXPERTS]._shares
        shares += [weakref.ref(t) for tensors in (kept or {}).values() for t in tensors]
        assert is_held() == bool(kept)
    assert shares

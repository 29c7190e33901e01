"""The merger writes into resident weights, and yields them."""

import re
import subprocess
import sys

import pytest
import torch

import searchmerge
from searchmerge.errors import EvaluationError, SpecError
from searchmerge.merging.merger import Merger, merge_weights
from searchmerge.merging.method import METHODS, default_plan
from searchmerge.merging.residency import Memory
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import Groups, MergePlan

EXPERTS = ("math", "code", "law")


def weights(n=300):
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "embed.weight": (40, n // 10),
        "layers.0.w": (n, 7),
        "layers.1.w": (n, 7),
        "norm": (n,),
    }
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    experts = {
        e: {k: t + 0.01 * torch.randn(t.shape, generator=draw) for k, t in base.items()}
        for e in EXPERTS
    }
    return base, experts


def vectors():
    return TaskVectors.from_weights(*weights())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [Groups(), Groups(depth=2)])
def test_applying_writes_what_merging_yields(method, groups):
    own = vectors()
    plan = default_plan(method, EXPERTS, groups=groups, depth_slope=0.5)
    targets = {n: torch.full_like(t, 9.0, dtype=torch.bfloat16) for n, t in own.base.items()}
    Merger(own, targets=targets).apply(plan)
    for name, tensor in Merger(own).merged(plan, dtype=torch.bfloat16):
        assert torch.equal(targets[name], tensor)


def test_a_plan_is_applied_afresh_whatever_was_there_before():
    own = vectors()
    targets = {n: torch.empty_like(t) for n, t in own.base.items()}
    merger = Merger(own, targets=targets)
    for method in ("ties", "linear", "pcb", "ties"):
        plan = default_plan(method, EXPERTS)
        merger.apply(plan)
        assert all(torch.equal(targets[n], t) for n, t in Merger(own).merged(plan))


@pytest.mark.parametrize("method", ["linear", "pcb", "dare"])
def test_experts_of_any_layout_are_read(method):
    base, experts = weights()
    plan = default_plan(method, EXPERTS)
    expected = dict(Merger(vectors()).merged(plan))
    turned = {
        e: {**own, "layers.0.w": own["layers.0.w"].t().contiguous().t()}
        for e, own in experts.items()
    }
    merger = Merger(TaskVectors.from_weights(base, turned))
    for _ in range(2):
        for name, tensor in merger.merged(plan):
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_computed_each_time_and_said_so(caplog):
    own, plan = vectors(), default_plan("tsv", EXPERTS)
    with caplog.at_level("WARNING"):
        merger = Merger(own, memory=Memory(keep_bytes=1000))
        found = [dict(merger.merged(plan)) for _ in range(2)]
    expected = dict(Merger(own, memory=Memory(keep_bytes=2**30)).merged(plan))
    for again in found:
        assert all(torch.equal(again[n], t) for n, t in expected.items())
    assert [r.message for r in caplog.records] == [
        "there is no memory to keep what is measured: each merge does it anew"
    ]


def test_targets_of_any_layout_are_written():
    own = vectors()
    store = torch.zeros(2, 7, 300)
    targets = {n: torch.empty_like(t) for n, t in own.base.items()}
    targets["layers.0.w"] = store[1].t()
    plan = default_plan("ties", EXPERTS)
    Merger(own, targets=targets).apply(plan)
    assert torch.equal(store[1].t(), dict(Merger(own).merged(plan))["layers.0.w"])
    assert (store[0] == 0).all()


def test_a_tied_tensor_is_written_under_every_name_with_memory_of_its_own():
    base, experts = weights()
    base["lm_head.weight"] = base["embed.weight"]
    own = TaskVectors.from_weights(base, experts)
    plan = default_plan("linear", EXPERTS)
    expected = dict(Merger(own).merged(plan))["embed.weight"]
    targets = {n: torch.empty_like(t) for n, t in base.items()}
    Merger(own, targets=targets).apply(plan)
    assert torch.equal(targets["lm_head.weight"], expected)
    assert torch.equal(targets["embed.weight"], expected)
    del targets["embed.weight"]
    targets["lm_head.weight"].zero_()
    Merger(own, targets=targets).apply(plan)
    assert torch.equal(targets["lm_head.weight"], expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_subset_of_the_experts_in_any_order_is_merged_as_if_it_were_all(method):
    base, experts = weights()
    plan = default_plan(method, ("law", "math"), coefficient=[0.3, 0.9])
    found = dict(Merger(vectors()).merged(plan))
    some = {name: experts[name] for name in ("law", "math")}
    for name, tensor in merge_weights(base, some, plan).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def test_other_tensors_of_the_base_come_out_as_they_are():
    base, experts = weights()
    base |= {"ids": torch.arange(3), "frozen": torch.ones(2)}
    own = TaskVectors.from_weights(base, experts | {}, exclude=["frozen"])
    found = dict(Merger(own).merged(default_plan("linear", EXPERTS), dtype=torch.float16))
    assert found.keys() == base.keys()
    assert found["ids"].dtype == torch.int64
    assert found["frozen"].dtype == torch.float16


def test_weights_may_need_gradients():
    base, experts = weights()
    base = {n: t.requires_grad_() for n, t in base.items()}
    merged = merge_weights(base, experts, default_plan("pcb", EXPERTS))
    assert not any(t.requires_grad for t in merged.values())


def test_statistics_are_cached_between_mergers(tmp_path):
    for method in ("ties", "pcb"):
        plan = default_plan(method, EXPERTS)
        found = [
            dict(Merger(vectors(), cache=tmp_path, cache_key="k").merged(plan)) for _ in range(2)
        ]
        assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(SpecError, match="a cache needs a cache_key"):
        Merger(vectors(), cache=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": None}, "the resident model has no tensor 'norm' to merge into; exclude it"),
        (
            {"norm": torch.ones(3)},
            "'norm' of the resident model has shape (3,); the base's has (300,)",
        ),
        ({"norm": "base"}, "'norm' of the resident model is the base's own memory"),
    ],
)
def test_targets_that_do_not_fit_are_refused(change, message):
    own = vectors()
    targets = {n: torch.empty_like(t) for n, t in own.base.items()}
    [(name, target)] = change.items()
    targets[name] = own.base[name] if isinstance(target, str) else target
    if target is None:
        del targets[name]
    with pytest.raises(SpecError, match=re.escape(message)):
        Merger(own, targets=targets)


def test_plans_that_do_not_fit_are_refused():
    merger = Merger(vectors())
    with pytest.raises(SpecError, match=r"'art' is not loaded \(there are: math, code, law\)"):
        dict(merger.merged(default_plan("linear", ("math", "art"))))
    with pytest.raises(SpecError, match="there are no targets to apply a plan to"):
        merger.apply(default_plan("linear", EXPERTS))
    with pytest.raises(SpecError, match="the model has 2 layers"):
        dict(merger.merged(default_plan("linear", EXPERTS, groups=Groups(depth=3))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_tensor_that_is_not_finite_in_its_dtype_is_refused_by_name(dtype):
    base, experts = weights()
    base["norm"][3] = torch.finfo(dtype).max / 2
    for own in experts.values():
        own["norm"][3] = torch.finfo(dtype).max * 0.9
    own = TaskVectors.from_weights(base, experts)
    targets = {n: torch.empty_like(t, dtype=dtype) for n, t in base.items()}
    merger = Merger(own, targets=targets)
    merger.apply(MergePlan("task_arithmetic", EXPERTS[:1], {"coefficient": ((0.5,),)}))
    too_far = MergePlan("task_arithmetic", EXPERTS, {"coefficient": ((0.9, 0.9, 0.9),)})
    message = rf"merged tensor 'norm' is not finite in {dtype}, which ends at"
    if dtype == torch.float16:
        with pytest.raises(EvaluationError, match=message):
            merger.apply(too_far)
    with pytest.raises(EvaluationError, match=message):
        dict(merger.merged(too_far, dtype=dtype))
    merger.apply(default_plan("linear", EXPERTS))
    assert all(target.isfinite().all() for target in targets.values())


def test_what_is_not_merged_is_refused_where_the_dtype_does_not_hold_it():
    base, experts = weights()
    base["norm"][3] = 70_000.0
    own = TaskVectors.from_weights(base, experts, exclude=["norm"])
    merged = Merger(own).merged(default_plan("linear", EXPERTS), dtype=torch.float16)
    with pytest.raises(EvaluationError, match=r"'norm' is not finite in torch\.float16, which"):
        dict(merged)


def test_the_package_is_light_to_import_and_still_merges():
    code = "import sys, searchmerge; assert 'torch' not in sys.modules; searchmerge.merge_weights"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert searchmerge.merge_weights is merge_weights
    with pytest.raises(AttributeError, match="has no attribute 'merge'"):
        searchmerge.merge  # noqa: B018


@pytest.mark.gpu
@pytest.mark.parametrize("residency", ["device", "pinned", "mapped"])
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_merges_what_a_cpu_merges(method, residency):
    own = vectors()
    plan = default_plan(method, EXPERTS)
    targets = {n: torch.empty_like(t, device="cuda") for n, t in own.base.items()}
    Merger(own, targets=targets, memory=Memory(residency)).apply(plan)
    for name, tensor in Merger(own).merged(plan):
        off = ~torch.isclose(targets[name].cpu(), tensor, rtol=1e-5, atol=1e-5)
        assert off.sum() <= max(2, off.numel() // 1000)

"""What every merge method keeps to, on both ways of running."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from searchmerge.errors import SpecError
from searchmerge.merging.engine import Engine
from searchmerge.merging.measure import Measure, MemoryBudget
from searchmerge.merging.merger import Merger, merge_weights
from searchmerge.merging.method import (
    COEFFICIENT,
    DEPTH_SLOPE,
    METHODS,
    default_plan,
    hyperparameter,
    validate_plan,
)
from searchmerge.merging.operands import Operands
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import Groups, MergePlan
from tests.merging.compiling import needs_compiler

EXPERTS = ("math", "code", "law")
SHAPES = {
    "model.embed.weight": (23, 12),
    "model.layers.0.fc.weight": (12, 30),
    "model.layers.0.norm.weight": (12,),
    "model.layers.1.fc.weight": (12, 30),
    "model.layers.2.fc.weight": (12, 30),
    "model.head.weight": (23, 12),
}


def weights(seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    experts = {
        expert: {
            name: (t + 0.05 * torch.randn(t.shape, generator=draw).pow(3)).to(dtype)
            for name, t in base.items()
        }
        for expert in EXPERTS
    }
    return {name: t.to(dtype) for name, t in base.items()}, experts


def run(plan, base, experts, engine="eager"):
    return dict(Merger(TaskVectors.from_weights(base, experts), engine=engine).merged(plan))


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **tolerance)


WAYS = [
    pytest.param(method, engine, id=f"{method}-{engine}")
    for method in METHODS
    for engine in ("eager", "compiled")
]
on_both_ways = pytest.mark.parametrize(("method", "engine"), WAYS)


def of_scopes(*scopes):
    """Both ways of the methods whose merged entries depend on these."""
    ways = [way for way in WAYS if METHODS[way.values[0]].scope in scopes]
    return pytest.mark.parametrize(("method", "engine"), ways)


of_every_method = pytest.mark.parametrize("method", METHODS)


@on_both_ways
def test_coefficients_of_zero_leave_the_base(method, engine):
    base, experts = weights(dtype=torch.bfloat16)
    plan = default_plan(method, EXPERTS, coefficient=0.0)
    assert_same(run(plan, base, experts, engine), base, rtol=0, atol=0)


@on_both_ways
def test_the_order_of_experts_does_not_matter(method, engine):
    base, experts = weights()
    numbers = {
        h.name: [h.search[0], h.default, h.search[1]] for h in METHODS[method].hyperparameters
    }
    plan = default_plan(method, EXPERTS, **numbers)
    order = (2, 0, 1)
    other = default_plan(
        method,
        [EXPERTS[i] for i in order],
        **{name: [row[i] for i in order] for name, row in numbers.items()},
    )
    expected = run(plan, base, experts, engine)
    assert_same(run(other, base, experts, engine), expected, rtol=0, atol=0)
    loaded = {EXPERTS[i]: experts[EXPERTS[i]] for i in order}
    assert_same(run(other, base, loaded, engine), expected, rtol=1e-5, atol=1e-5)


def halved(own):
    """Return every tensor as two, cut along its rows."""
    return {f"{n}.{i}": t for n, whole in own.items() for i, t in enumerate(halves(whole))}


def halves(tensor):
    return tensor[:5].clone(), tensor[5:].clone()


@of_scopes("entry")
def test_splitting_a_parameter_changes_nothing(method, engine):
    base, experts = weights()
    plan = default_plan(method, EXPERTS)
    whole = run(plan, base, experts, engine)
    parts = run(plan, halved(base), {e: halved(own) for e, own in experts.items()}, engine)
    joined = {n: torch.cat([parts[f"{n}.0"], parts[f"{n}.1"]]) for n in base}
    assert_same(joined, whole, rtol=1e-6, atol=1e-6)


@of_scopes("draw", "tensor")
def test_other_parameters_do_not_matter_to_draws_and_whole_tensors(method, engine):
    base, experts = weights()
    plan = default_plan(method, EXPERTS)
    whole = run(plan, base, experts, engine)
    some = list(SHAPES)[1::2]
    few = {e: {n: own[n] for n in some} for e, own in experts.items()}
    alone = run(plan, {n: base[n] for n in some}, few, engine)
    assert_same(alone, {n: whole[n] for n in some}, rtol=0, atol=0)


@on_both_ways
def test_a_parameter_may_be_cut_anywhere_while_it_is_merged(method, engine):
    """As the engine does with large ones: draws go on where they were."""
    base, experts = weights()
    vectors = TaskVectors.from_weights(base, experts)
    measure = Measure(vectors, Engine("eager"), MemoryBudget(2**30))
    work = METHODS[method](measure).bind(default_plan(method, EXPERTS))
    name = "model.layers.1.fc.weight"
    chosen = range(len(EXPERTS)) if work.experts is None else work.experts
    parameter = Operands(
        base[name].reshape(-1),
        tuple(experts[EXPERTS[i]][name].reshape(-1) for i in chosen),
        work.scalars(name),
        work.kept.get(name, ()),
        work.keys(name) if work.keys else None,
    )
    whole, parts = torch.empty(360), torch.empty(360)
    runner = Engine(engine)
    runner.merge(work.function, parameter, 1.0, whole)
    for start, stop in ((0, 100), (100, 101), (101, 360)):
        runner.merge(work.function, parameter.part(start, stop), 1.0, parts[start:stop])
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU refuses: a number of the CPU in other than the two-sided operations."""

    TWO_SIDED = frozenset(
        {
            *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"),
            *("ge", "gt", "le", "lt", "eq", "ne", "where", "copy_", "_to_copy"),
            *("bitwise_and", "bitwise_xor", "bitwise_xor_", "bitwise_right_shift"),
        }
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {own.device.type for own in tree_leaves((args, kwargs)) if torch.is_tensor(own)}
        name = func.overloadpacket.__name__
        assert len(devices) < 2 or name in self.TWO_SIDED, f"{name} takes one device only"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (name, {setting.name: choice})
        for name, method in METHODS.items()
        for setting in method.settings
        for choice in setting.choices or (setting.default,)
    ],
    ids=str,
)
def test_arithmetic_runs_where_numbers_lie_on_the_cpu_and_parameters_do_not(method, settings):
    """As on a GPU where nothing is compiled; the meta device is as far from the CPU."""
    base, experts = weights()
    for keep_bytes in (0, 2**20):
        vectors = TaskVectors.from_weights(base, experts)
        measure = Measure(vectors, Engine("eager"), MemoryBudget(keep_bytes))
        work = METHODS[method](measure).bind(default_plan(method, EXPERTS, **settings))
        name = "model.layers.1.fc.weight"
        chosen = range(len(EXPERTS)) if work.experts is None else work.experts
        kept = work.kept[name] if work.kept else ()
        parameter = Operands(
            base[name].reshape(-1).to("meta"),
            tuple(experts[EXPERTS[i]][name].reshape(-1).to("meta") for i in chosen),
            work.scalars(name),
            tuple(own.to("meta") for own in kept),
            work.keys(name) if work.keys else None,
        )
        out = torch.empty(360, device="meta")
        with OneDevice():
            tally = Engine("eager").merge(work.function, parameter, 0.5, out)
        assert tally is None or tally.device == out.device


@on_both_ways
@pytest.mark.parametrize("groups", [Groups(depth=3), Groups(patterns=("fc", "rest"))])
def test_groups_with_equal_rows_equal_the_whole_plan(method, engine, groups):
    base, experts = weights()
    expected = run(default_plan(method, EXPERTS), base, experts, engine)
    found = run(default_plan(method, EXPERTS, groups=groups), base, experts, engine)
    assert_same(found, expected, rtol=0, atol=0)


@needs_compiler
@of_every_method
def test_compiled_and_eager_code_agree(method, caplog):
    base, experts = weights(seed=3)
    for dtype in (torch.float32, torch.bfloat16):
        own = {n: t.to(dtype) for n, t in base.items()}
        plan = default_plan(method, EXPERTS)
        merger = Merger(TaskVectors.from_weights(own, experts), engine="compiled")
        found = dict(merger.merged(plan))
        assert_same(found, run(plan, own, experts, "eager"), rtol=1e-5, atol=1e-6)
    assert "runs uncompiled" not in caplog.text


@of_every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_shapes_and_dtypes_are_the_bases(method, dtype):
    base, experts = weights(dtype=dtype)
    base["step"] = torch.tensor(3)
    base["scalar"], base["empty"] = torch.tensor(0.5, dtype=dtype), torch.empty(0, 4, dtype=dtype)
    for i, own in enumerate(experts.values()):
        own |= {"step": torch.tensor(9), "empty": base["empty"].clone()}
        own["scalar"] = torch.tensor(0.5 + i, dtype=dtype)
    copies = {n: t.clone() for n, t in base.items()}
    merged = merge_weights(base, experts, default_plan(method, EXPERTS))
    assert list(merged) == list(base)
    for name, tensor in merged.items():
        assert (tensor.shape, tensor.dtype) == (base[name].shape, base[name].dtype)
        assert torch.isfinite(tensor).all()
        assert torch.equal(base[name], copies[name])
    assert merged["step"] == 3


@of_every_method
def test_one_expert_alone_can_be_merged(method):
    base, experts = weights()
    merged = run(default_plan(method, EXPERTS[:1]), base, experts)
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())


@of_every_method
def test_a_slope_multiplies_what_merging_adds_to_each_layer(method):
    base, experts = weights()
    flat = run(default_plan(method, EXPERTS), base, experts)
    sloped = run(default_plan(method, EXPERTS, depth_slope=0.6), base, experts)
    factors = dict(zip(SHAPES, (1.0, 1.0, 1.0, 1.3, 1.6, 1.6), strict=True))
    expected = {n: base[n] + factors[n] * (flat[n] - base[n]) for n in base}
    assert_same(sloped, expected, rtol=1e-5, atol=1e-5)


@of_every_method
def test_what_a_method_declares_makes_sense(method):
    entry = METHODS[method]
    names = [h.name for h in entry.hyperparameters]
    assert COEFFICIENT.name in names
    assert len({*names, *(s.name for s in entry.settings)}) == len(names) + len(entry.settings)
    assert DEPTH_SLOPE in entry.settings
    for h in entry.hyperparameters:
        assert h.low <= h.search[0] < h.search[1] <= h.high
        assert h.low <= h.default <= h.high
    validate_plan(default_plan(method, EXPERTS, **{s.name: s.default for s in entry.settings}))


@of_every_method
def test_numbers_out_of_range_are_refused_by_name(method):
    for h in METHODS[method].hyperparameters:
        for bad in (h.low - 0.5, h.high + 0.5):
            good = default_plan(method, EXPERTS, groups=Groups(patterns=("fc", "rest")))
            row = (h.default, bad, h.default)
            values = {**good.values, h.name: (good.values[h.name][0], row)}
            plan = MergePlan(method, EXPERTS, values, good.groups, good.settings)
            message = (
                f"{h.name} of expert 'code' in group 'rest' is {bad}; method {method!r} allows"
            )
            with pytest.raises(SpecError, match=re.escape(message)):
                validate_plan(plan)
        with pytest.raises(
            SpecError, match=f"values.{h.name} of expert 'code' is nan, not finite"
        ):
            default_plan(method, EXPERTS, **{h.name: [1.0, float("nan"), 1.0]})


def test_an_unknown_method_is_refused_with_what_was_meant():
    with pytest.raises(SpecError, match="no merge method named 'tie'; did you mean 'ties'"):
        validate_plan(MergePlan("tie", ("a",), {}))


def test_a_missing_or_unknown_hyperparameter_is_refused():
    values = {"coefficient": ((1.0,),)}
    with pytest.raises(SpecError, match=r"method 'ties' needs values\.density; it is missing"):
        validate_plan(MergePlan("ties", ("a",), values))
    with pytest.raises(SpecError, match=r"no hyper-parameter 'densty'; did you mean 'density'"):
        validate_plan(MergePlan("ties", ("a",), {**values, "densty": ((1.0,),)}))


def test_a_hyperparameter_is_looked_up_by_name():
    assert hyperparameter("ties", "density") == METHODS["ties"].hyperparameters[1]
    with pytest.raises(SpecError, match=r"'linear' has no hyper-parameter 'density' \(it has"):
        hyperparameter("linear", "density")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("ties", {"agregate": "sum"}, r"no setting 'agregate'; did you mean 'aggregate'"),
        ("ties", {"aggregate": "median"}, r"is 'median'; allowed: mean, sum, max"),
        ("pcb", {"variant": True}, r"is True; allowed: reference, nlp, vision, vision_es"),
        ("linear", {"depth_slope": "steep"}, r"is 'steep'; allowed: a number in \[-1.0, 10.0\]"),
        ("linear", {"depth_slope": -2.0}, r"is -2.0; allowed: a number in \[-1.0, 10.0\]"),
    ],
)
def test_a_setting_that_is_not_allowed_is_refused(method, settings, message):
    with pytest.raises(SpecError, match=message):
        default_plan(method, ("a",), **settings)


def test_a_default_plan_says_all_and_takes_one_number_or_one_each():
    plan = default_plan("ties", ("a", "b"), coefficient=[0.1, 0.2], groups=Groups(depth=2))
    assert plan.values["coefficient"] == ((0.1, 0.2), (0.1, 0.2))
    assert plan.values["density"] == ((0.2, 0.2), (0.2, 0.2))
    assert plan.settings == {"aggregate": "mean"}

"""Gradients by coefficients: as finite differences give them, for every method and grouping."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from searchmerge.checkpoints.resident import writable_views
from searchmerge.errors import SpecError
from searchmerge.merging.engine import Engine
from searchmerge.merging.gradient import CoefficientGradients, Directions
from searchmerge.merging.merger import Merger
from searchmerge.merging.method import METHODS, default_plan
from searchmerge.merging.residency import Memory
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import Groups

EXPERTS = ("math", "code", "law")
LINEAR = sorted(n for n, m in METHODS.items() if any(h.is_linear for h in m.hyperparameters))
SETTINGS = [
    *((method, {}) for method in LINEAR),
    ("ties", {"aggregate": "max"}),
    ("dare", {"election": "ties"}),
    ("della", {"election": "none"}),
    ("task_arithmetic", {"depth_slope": 0.7}),
]
STEP = 3e-2  # where rounding and the next order are both small


class Net(nn.Module):
    """Two layers and an output that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return self.out(hidden)


TOKENS = torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(7))


def loss_of(model):
    logits = model(TOKENS[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())


def made(model, noise=0.3, engine="eager", memory=None):
    """Return a merger of random experts of a model into the model itself."""
    draw = torch.Generator().manual_seed(0)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    experts = {
        e: {k: t + noise * torch.randn(t.shape, generator=draw) for k, t in base.items()}
        for e in EXPERTS
    }
    model.requires_grad_(False)
    vectors = TaskVectors.from_weights(base, experts)
    targets = dict(model.named_parameters())
    return Merger(vectors, targets=targets, engine=engine, memory=memory)


def net():
    torch.manual_seed(0)
    return Net()


def random_plan(method, groups, settings=None):
    """Return a plan with other numbers in every group."""
    plan = default_plan(method, EXPERTS, groups=groups, **(settings or {}))
    draw = torch.Generator().manual_seed(1)
    rows = torch.rand(len(groups), len(EXPERTS), generator=draw) + 0.2
    coefficient = tuple(tuple(row) for row in rows.tolist())
    return replace(plan, values={**plan.values, "coefficient": coefficient})


def moved(plan, group, expert, by):
    rows = [list(row) for row in plan.values["coefficient"]]
    rows[group][expert] += by
    coefficient = tuple(map(tuple, rows))
    return replace(plan, values={**plan.values, "coefficient": coefficient})


def differences(model, merger, plan, loss=loss_of, step=STEP):
    """Return central differences, of fourth order, by every coefficient."""

    def at(group, expert, by):
        merger.apply(moved(plan, group, expert, by))
        with torch.no_grad():
            return float(loss(model).double())

    return torch.tensor(
        [
            [
                (
                    8 * (at(g, e, step) - at(g, e, -step))
                    - (at(g, e, 2 * step) - at(g, e, -2 * step))
                )
                / (12 * step)
                for e in range(len(plan.experts))
            ]
            for g in range(len(plan.groups))
        ],
        dtype=torch.float64,
    )


def gradient(model, merger, plan, loss=loss_of):
    gradients = CoefficientGradients(model, merger)
    merger.apply(plan)
    with gradients.collecting(plan) as rows:
        loss(model).backward()
        return torch.tensor(rows(), dtype=torch.float64)


def per_tensor(merger):
    return Groups.of_tensors(merger.targets)


GROUPINGS = [Groups(), Groups(depth=2), Groups(patterns=("bias", "rest")), "tensor"]


@pytest.mark.parametrize("groups", GROUPINGS, ids=str)
@pytest.mark.parametrize(("method", "settings"), SETTINGS, ids=str)
def test_a_gradient_is_what_finite_differences_give(method, settings, groups):
    model = net()
    merger = made(model)
    groups = per_tensor(merger) if groups == "tensor" else groups
    plan = random_plan(method, groups, settings)
    expected = differences(model, merger, plan)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient(model, merger, plan), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare", "tsv", "pcb"])
def test_compiled_arithmetic_gives_the_same_gradient(method):
    model = net()
    eager, compiled = made(model), made(model, engine="compiled")
    plan = random_plan(method, per_tensor(eager))
    expected = gradient(model, eager, plan)
    torch.testing.assert_close(gradient(model, compiled, plan), expected, rtol=1e-4, atol=1e-5)


def test_an_expert_that_a_method_leaves_out_has_no_gradient():
    model = net()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = {name: t + 0.1 for name, t in base.items()}
    vectors = TaskVectors.from_weights(base, {"math": base, "code": other, "law": other})
    merger = Merger(vectors, targets=dict(model.named_parameters()))
    plan = random_plan("pcb", Groups())
    expected = differences(model, merger, plan)
    assert expected[0, 0] == 0
    torch.testing.assert_close(gradient(model, merger, plan), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "pcb"])
def test_directions_that_are_kept_give_the_same_as_those_computed_anew(method):
    plan, rows = random_plan(method, Groups(depth=2)), []
    for keep_bytes in (0, 300, 1 << 30):  # none, those of some parameters, all
        model = net()
        merger = made(model, memory=Memory(keep_bytes=keep_bytes))
        rows.append(gradient(model, merger, plan))
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_a_parameter_is_gone_over_once_for_all_experts(method, settings, monkeypatch):
    merger, n_sets = made(net(), memory=Memory(keep_bytes=0)), []
    products = Engine.products

    def counted(self, function, operands, scalars, numbers):
        n_sets.append(len(scalars))
        return products(self, function, operands, scalars, numbers)

    monkeypatch.setattr(Engine, "products", counted)
    directions = merger.directions(random_plan(method, Groups(depth=2), settings))
    directions.products("embed.weight", torch.ones(12, 8))
    assert n_sets == [len(EXPERTS)]


@pytest.mark.parametrize(("most", "sizes"), [(1, [1, 1, 1]), (2, [2, 2]), (3, [3])])
def test_so_many_experts_as_a_kernel_has_registers_for_are_taken_at_once(most, sizes, monkeypatch):
    plan = random_plan("ties", Groups(depth=2))
    merger = made(net(), memory=Memory(keep_bytes=0))
    numbers = torch.linspace(-1, 1, 96).reshape(12, 8)
    wanted = merger.directions(plan).products("embed.weight", numbers)
    monkeypatch.setattr("searchmerge.merging.gradient._MOST_PASSES", most)
    directions = merger.directions(plan)
    assert [len(passes) for passes, _ in directions._kernels] == sizes  # one size
    assert torch.equal(directions.products("embed.weight", numbers), wanted)


def test_directions_give_back_their_memory_to_those_of_the_next_plan():
    model = net()
    merger = made(model, memory=Memory(keep_bytes=1 << 20))
    directions = merger.directions(random_plan("ties", Groups(depth=2)))
    before = directions.budget.left_bytes
    directions.products("embed.weight", torch.ones(12, 8))
    assert directions.budget.left_bytes == before - 4 * len(EXPERTS) * 12 * 8
    directions.release()
    assert directions.budget.left_bytes == before


@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [(torch.bfloat16, 2, 0.01), (torch.float16, 4, 1e-5), (torch.float32, 4, 1e-5)],
)
def test_directions_are_kept_as_exact_as_the_gradient_is(dtype, size, tolerance):
    merger = made(net(), memory=Memory(keep_bytes=1 << 20))
    anew = made(net(), memory=Memory(keep_bytes=0))
    plan = random_plan("ties", Groups(depth=2))
    numbers = torch.linspace(-1, 1, 96, dtype=dtype).reshape(12, 8)
    directions = merger.directions(plan)
    before = directions.budget.left_bytes
    kept = directions.products("embed.weight", numbers)
    assert before - directions.budget.left_bytes == size * len(EXPERTS) * 12 * 8
    wanted = anew.directions(plan).products("embed.weight", numbers)
    torch.testing.assert_close(kept, wanted, rtol=tolerance, atol=tolerance * float(wanted.max()))


def test_rows_are_in_the_plans_own_order_of_experts():
    model = net()
    merger = made(model)
    plan = random_plan("ties", Groups(depth=2))
    turned = plan.reordered(("law", "math", "code"))
    assert torch.equal(
        gradient(model, merger, turned), gradient(model, merger, plan)[:, [2, 0, 1]]
    )


@pytest.mark.parametrize("room", [0, 100, 1 << 20], ids=["none", "for some", "for all"])
@pytest.mark.parametrize("several", [False, True], ids=["at once", "added first"])
def test_every_pass_counts_until_the_rows_are_asked_for(several, room):
    model = net()
    merger = made(model)
    plan = random_plan("ties", Groups(depth=2))
    once = gradient(model, merger, plan)
    gradients = CoefficientGradients(model, merger)
    budget = merger.directions(plan).budget
    budget.left_bytes = room
    with gradients.collecting(plan, several=several) as rows:
        loss_of(model).backward()
        kept = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        assert kept == 0 if not several else kept <= room
        assert bool(kept) == (several and room > 0)
        loss_of(model).backward()
        twice = torch.tensor(rows(), dtype=torch.float64)
        torch.testing.assert_close(twice, 2 * once)
        loss_of(model).backward()
        torch.testing.assert_close(torch.tensor(rows(), dtype=torch.float64), once)
        loss_of(model).backward()  # of which nobody asks
    assert all(p.grad is None for p in model.parameters())
    if room == 1 << 20:
        n_entries = sum(copies[0].numel() for copies in merger.targets.values())
        assert room - budget.left_bytes == 4 * len(EXPERTS) * n_entries  # the directions alone


def test_no_gradient_stays_and_none_is_asked_for_afterwards():
    model = net()
    merger = made(model)
    plan = random_plan("ties", Groups())
    seen = []
    with CoefficientGradients(model, merger).collecting(plan):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad))
        loss_of(model).backward()
    assert seen == [None] * len(list(model.parameters()))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_what_a_model_has_twice_of_one_parameter_counts_twice():
    model = net()
    model.out.weight = nn.Parameter(model.embed.weight.detach().clone(), requires_grad=False)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    base["out.weight"] = base["embed.weight"]
    experts = {e: {n: t + 0.1 * (i + 1) for n, t in base.items()} for i, e in enumerate(EXPERTS)}
    for tensors in experts.values():
        tensors["out.weight"] = tensors["embed.weight"]
    merger = Merger(
        TaskVectors.from_weights(base, experts), targets=dict(model.named_parameters())
    )
    plan = random_plan("task_arithmetic", per_tensor(merger))
    expected = differences(model, merger, plan)
    torch.testing.assert_close(gradient(model, merger, plan), expected, rtol=2e-3, atol=2e-4)


def test_tensors_that_the_model_holds_as_one_have_gradients_of_their_own():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    heads["num_experts_per_tok"] = 3  # which are chosen does not jump
    model = MixtralForCausalLM(MixtralConfig(vocab_size=12, **sizes, **heads)).eval()
    views = writable_views(model)
    assert len(views) > len(list(model.parameters()))
    draw = torch.Generator().manual_seed(0)
    base = {name: view.detach().clone() for name, view in views.items()}
    experts = {
        e: {k: t + 0.1 * torch.randn(t.shape, generator=draw) for k, t in base.items()}
        for e in EXPERTS
    }
    merger = Merger(TaskVectors.from_weights(base, experts), targets=views)
    plan = random_plan("task_arithmetic", Groups(patterns=(r"\.w1\.", "rest")))

    def loss(model):
        logits = model(TOKENS[:, :-1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())

    expected = differences(model, merger, plan, loss)
    torch.testing.assert_close(gradient(model, merger, plan, loss), expected, rtol=5e-3, atol=5e-4)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(LINEAR)))
def test_a_method_that_is_not_linear_says_so(method):
    model = net()
    merger = made(model)
    message = re.escape(f"method {method!r} is not linear in its coefficients")
    with (
        pytest.raises(SpecError, match=message),
        CoefficientGradients(model, merger).collecting(random_plan(method, Groups())),
    ):
        pass


def test_a_merger_of_other_weights_than_the_models_is_refused():
    with pytest.raises(
        SpecError, match=r"gradient: tensor 'embed.weight' is no part of the model"
    ):
        CoefficientGradients(net(), made(net()))


def test_a_plan_of_another_density_has_another_gradient():
    model = net()
    merger = made(model)
    gradients = CoefficientGradients(model, merger)
    for density in (0.2, 0.9):
        plan = default_plan("ties", EXPERTS, density=density)
        merger.apply(plan)
        with gradients.collecting(plan) as rows:
            loss_of(model).backward()
            given = torch.tensor(rows(), dtype=torch.float64)
        expected = differences(model, merger, plan)
        torch.testing.assert_close(given, expected, rtol=2e-3, atol=2e-4)


def test_all_is_compiled_before_a_backward_pass_begins(monkeypatch):
    model = net()
    merger, asked = made(model), []

    def products(self, name, gradient):
        asked.append((name, gradient.shape))
        return torch.zeros(len(EXPERTS), dtype=torch.float64)

    monkeypatch.setattr(Engine, "is_compiled", lambda *_: True)
    monkeypatch.setattr(Directions, "products", products)
    plan = default_plan("task_arithmetic", EXPERTS)
    gradients = CoefficientGradients(model, merger)
    for _ in range(2):  # once for all passes of a refinement
        with gradients.collecting(plan):
            assert asked == [(name, copies[0].shape) for name, copies in merger.targets.items()]


@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_what_was_merged_before_changes_no_bit_of_weights_and_gradient(method, settings):
    plan = random_plan(method, Groups(depth=2), settings)
    histories = [
        [],
        [plan],
        [moved(plan, 0, 1, 0.5), plan, default_plan(method, EXPERTS)],
    ]
    given = []
    for before in histories:
        model = net()
        merger = made(model)
        for other in before:
            merger.apply(other)
        gradients = CoefficientGradients(model, merger)
        for _ in range(2):
            gradients.prepare(plan)
            merger.apply(plan)
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            with gradients.collecting(plan) as rows:
                loss_of(model).backward()
                given.append((weights, rows()))
    for weights, rows in given[1:]:
        assert rows == given[0][1]
        assert all(torch.equal(w, given[0][0][name]) for name, w in weights.items())

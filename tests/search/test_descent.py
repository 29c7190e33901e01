"""Steps on coefficients, and the plans that they stand for."""

import numpy as np
import pytest
import torch

from searchmerge.errors import SpecError
from searchmerge.merging.groups import assign_groups
from searchmerge.merging.method import default_plan
from searchmerge.plan import Groups, MergePlan
from searchmerge.search.descent import Adam, Path, regrouped

EXPERTS = ("math", "code")
NAMES = ("embed.w", "layers.0.w", "layers.0.b", "layers.1.w", "layers.1.b", "layers.2.w", "norm.w")


def rows_by_name(plan):
    return {
        name: {key: rows[group] for key, rows in plan.values.items()}
        for name, group in assign_groups(NAMES, plan.groups).items()
    }


@pytest.mark.parametrize("groups", [Groups.of_tensors(NAMES), Groups(depth=3), Groups()])
def test_finer_groups_begin_with_the_rows_of_the_groups_that_they_are_in(groups):
    plan = default_plan("ties", EXPERTS, coefficient=[0.3, 0.9], density=[0.2, 0.4])
    finer = regrouped(plan, groups, NAMES)
    assert finer.groups == groups
    assert rows_by_name(finer) == rows_by_name(plan)


def test_groups_with_different_rows_are_not_thrown_together():
    rows = ((0.1, 0.2), (0.3, 0.4), (0.5, 0.6))
    plan = MergePlan("task_arithmetic", EXPERTS, {"coefficient": rows}, Groups(depth=3))
    finer = regrouped(plan, Groups.of_tensors(NAMES), NAMES)
    assert rows_by_name(finer) == rows_by_name(plan)
    with pytest.raises(SpecError, match="group 'depth0' has parameters with different coefficien"):
        regrouped(plan, Groups(depth=2), NAMES)


def test_a_path_holds_plans_within_what_the_method_allows():
    path = Path.of(default_plan("ties", EXPERTS, density=0.3))
    assert path.first.tolist() == [[1.0, 1.0]]
    plan = path.plan(np.array([[0.123456, 99.0]]))
    assert plan.values == {"coefficient": ((0.1235, 10.0),), "density": ((0.3, 0.3),)}
    assert path.part(np.array([[2.0, 0.0]]), 0.25).tolist() == [[1.25, 0.75]]
    with pytest.raises(SpecError, match="method 'karcher' is not linear"):
        Path.of(default_plan("karcher", EXPERTS))


def test_the_steps_are_those_of_adam_with_a_rate_that_falls():
    first = np.array([[1.0, -1.0], [0.5, 0.0]])
    ours, theirs = Adam(first, 0.1, 6), torch.nn.Parameter(torch.tensor(first))
    optimizer = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99))
    draw, square = np.random.default_rng(0), 0.0
    for step in range(6):
        gradient = draw.normal(size=first.shape)
        square = 0.99 * square + 0.01 * np.mean(gradient**2)
        optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, 2 * (1 - step / 6))
        optimizer.param_groups[0]["eps"] = 0.01 * np.sqrt(square / (1 - 0.99 ** (step + 1)))
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
        ours.step(gradient)
    np.testing.assert_allclose(ours.at, theirs.detach().numpy(), rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_coefficient_whose_gradient_is_rounding_alone_stays_where_it_is(scale):
    """It does with torch's epsilon, 1e-8, only where gradients are as small."""
    descent, draw = Adam(np.ones((3, 2)), 0.1, 20), np.random.default_rng(0)
    for _ in range(20):
        gradient = 1.0 + 0.1 * draw.normal(size=(3, 2))
        gradient[1] = 1e-6 * draw.normal(size=2)
        descent.step(scale * gradient)
    assert np.abs(descent.at[1] - 1).max() < 1e-3
    assert (descent.at[[0, 2]] < 0).all()


def test_where_nothing_has_a_gradient_nothing_moves():
    descent = Adam(np.ones((2, 2)), 0.1, 5)
    descent.step(np.zeros((2, 2)))
    assert np.array_equal(descent.at, np.ones((2, 2)))

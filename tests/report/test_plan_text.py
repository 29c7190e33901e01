"""Plans in reports: short ones in full, and what the numbers of long ones are like."""

import pytest

from searchmerge.plan import Groups, MergePlan
from searchmerge.report.plan_text import plan_text

EXPERTS = ("math", "co|de")
NAMES = [f"layers.{i}.{what}.weight" for i in range(20) for what in ("up", "down")]


def tensor_plan(n_layers=20, **values):
    """Return a plan whose coefficients tell layers and tensors apart."""
    groups = Groups.of_tensors([name for name in NAMES if int(name.split(".")[1]) < n_layers])
    rows = []
    for name in groups.tensors:
        layer = int(name.split(".")[1])
        rows.append((1.0 + layer / 10, 0.51) if "up" in name else (0.25, -layer / 10))
    densities = {name: ((density,) * 2,) * len(groups) for name, density in values.items()}
    return MergePlan("ties", EXPERTS, {"coefficient": tuple(rows), **densities}, groups)


@pytest.mark.parametrize(
    "plan",
    [
        tensor_plan(n_layers=3),
        MergePlan("ties", EXPERTS, {"coefficient": ((0.1, 0.2),) * 90}, Groups(depth=90)),
        MergePlan(
            "ties",
            EXPERTS,
            {"coefficient": ((0.1, 0.2),) * len(NAMES)},
            Groups.of_tensors(NAMES),
        ),
    ],
)
def test_a_plan_that_is_short_or_by_groups_that_were_asked_for_is_shown_in_full(plan):
    assert plan_text(plan, "trial 3") == f"```yaml\n{plan.to_yaml().rstrip()}\n```"


def test_of_a_long_one_each_kind_of_tensor_has_a_line():
    text = plan_text(tensor_plan(density=0.2), "refined TSV-M")
    first, table = text.split("\n\n")
    assert first.startswith("`ties`, with values of their own for each of 40 tensors.")
    assert first.endswith("all of them are in `plans/refined-TSV-M.yaml`.")
    assert table.splitlines() == [
        "| | math | co\\|de |",
        "|---|---|---|",
        "| coefficient, all tensors | 1.10 [0.25, 2.90] | -0.22 [-1.90, 0.51] |",
        "| `layers.{0..19}.down.weight` | 0.25 | -0.95 [-1.90, 0.00] |",
        "| `layers.{0..19}.up.weight` | 1.95 [1.00, 2.90] | 0.51 |",
        "| density, all tensors | 0.2 | 0.2 |",
    ]


def test_settings_are_said():
    plan = MergePlan.from_dict({**tensor_plan().to_dict(), "settings": {"aggregate": "mean"}})
    assert plan_text(plan, "x").startswith("`ties` (aggregate mean), with values")


def test_of_many_kinds_there_is_one_line_for_all():
    names = Groups.of_tensors([f"block{i}.weight" for i in range(50)])
    rows = tuple((i / 10, 1.0) for i in range(50))
    plan = MergePlan("ties", EXPERTS, {"coefficient": rows}, names)
    lines = plan_text(plan, "x").splitlines()
    assert lines[-1] == "| coefficient, all tensors | 2.45 [0.00, 4.90] | 1 |"
    assert lines[-2].startswith("|---")

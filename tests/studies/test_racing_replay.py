"""The replay of recorded plans: how what a rule saves stands to the references."""

import numpy as np
import pytest

from searchmerge.search.objective import Goal
from searchmerge.search.references import BASE, expert_name
from studies.racing.replay import RULES, Lead, Recording, Run

TASKS = {"a": Goal(1.0, "a"), "b": Goal(3.0, "b")}
REFERENCES = {BASE: 0.3, expert_name("a"): 0.75, expert_name("b"): 0.75, "average": 0.6}
N_SELECT, N_HOLD_OUT, N_FURTHER = 64, 64, 400


def recording(**accuracies):
    """Return what plans score whose answers to an example hang together."""
    plans = {**REFERENCES, **accuracies}
    generator = np.random.default_rng(3)
    values = {}
    for task in TASKS:
        hard = generator.random(N_SELECT + N_HOLD_OUT + N_FURTHER)
        noise = generator.normal(0.0, 0.1, (len(plans), len(hard)))
        right = hard + noise < np.array([*plans.values()])[:, None]
        values[task] = right.astype(float)
    unknown = {task: np.full(table.shape, np.nan) for task, table in values.items()}
    n_references = sum(not name.startswith("plan ") for name in plans)
    return Recording(list(plans), n_references, TASKS, values, unknown)


def outcome(recorded, rule):
    n_trials = len(recorded.rows) - recorded.n_references
    return Run(recorded, 0, N_SELECT, N_HOLD_OUT, n_trials).under(RULES[rule])


def test_a_lead_is_the_difference_of_the_objectives_and_its_error_that_of_a_bootstrap():
    recorded = recording(**{"plan 0": 0.68})
    examples = {task: np.arange(N_SELECT, N_SELECT + N_FURTHER) for task in TASKS}
    names = recorded.rows
    row, other = names.index("plan 0"), names.index("average")
    lead = recorded.lead(row, other, examples)
    truth = recorded.truth(examples)
    assert lead.points == pytest.approx(100 * (truth[row] - truth[other]))
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        sample = {task: generator.choice(its, len(its)) for task, its in examples.items()}
        resampled = recorded.truth(sample)  # relative to what the experts score on it
        drawn.append(100 * (resampled[row] - resampled[other]))
    assert lead.error == pytest.approx(np.std(drawn), rel=0.06)


@pytest.mark.parametrize(
    ("points", "error", "below"), [(-2.0, 1.0, True), (-1.9, 1.0, False), (0.0, 0.0, False)]
)
def test_below_is_what_an_interval_says(points, error, below):
    assert Lead(points, error).is_below is below


def test_found_plans_alone_may_end_below_a_reference_that_competes_where_all_do():
    recorded = recording(TIES=0.9, **{f"plan {i}": 0.5 for i in range(6)})
    alone = outcome(recorded, "before")
    assert alone.best.is_below
    assert alone.picked == alone.best  # the best reference has the best evidence
    assert alone.regret == pytest.approx(-alone.best.points)
    assert outcome(recorded, "all compete").best == Lead(0.0, 0.0)


def test_a_found_plan_that_is_better_is_ahead_of_the_references_that_are_merges():
    plans = {"plan 0": 0.9, **{f"plan {i}": 0.5 for i in range(1, 6)}}
    found = outcome(recording(TIES=0.8, **plans), "all compete")
    assert found.regret == 0.0
    assert found.best.points > 5
    assert found.picked.points >= found.best.points
    assert not found.best.is_below


def test_the_reference_that_does_best_need_not_be_the_one_with_the_best_evidence():
    """The further examples are others than those that evidence is of."""
    plans = {f"plan {i}": 0.5 for i in range(6)}
    recorded = recording(TIES=0.8, PCB=0.8, **plans)
    outcomes = [
        Run(recorded, seed, N_SELECT, N_HOLD_OUT, 6).under(RULES["all compete"])
        for seed in range(12)
    ]
    assert all(run.best.points <= run.picked.points + 1e-9 for run in outcomes)
    assert any(run.best.points < run.picked.points for run in outcomes)


def test_a_regret_that_is_luck_is_told_from_one_that_is_not():
    alike = {f"plan {i}": 0.85 for i in range(40)}
    outcomes = [
        Run(recording(**alike), seed, N_SELECT, N_HOLD_OUT, 40).under(RULES["before"])
        for seed in range(10)
    ]
    regret = np.mean([run.regret for run in outcomes])
    assert regret > 1.0
    assert abs(np.mean([run.aside for run in outcomes])) < regret / 2
    worse = {"TIES": 0.9, **{f"plan {i}": 0.5 for i in range(6)}}
    lost = outcome(recording(**worse), "before")
    assert lost.aside == pytest.approx(lost.regret, abs=3.0)

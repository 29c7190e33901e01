"""Evidence: values drawn to what is usual by as much as they owe to chance."""

import numpy as np
import pytest

from searchmerge.search.evidence import Evidence, Expected, Measured

UNITS = {"a": 0.25, "b": 0.75}


def observed(rng, true, n=50):
    """Return plans that are right as often as ``true`` says, on examples of their own luck."""
    return {
        name: {task: (rng.random(n) < rate).astype(float) for task in UNITS}
        for name, rate in true.items()
    }


def test_values_and_their_errors_are_those_of_paired_means():
    data = observed(np.random.default_rng(0), {"p": 0.5, "q": 0.7, "r": 0.9})
    told = Measured.of(data, UNITS)
    values, variances = [], []
    for name in data:
        value = variance = 0.0
        for task, unit in UNITS.items():
            difference = data[name][task] - np.mean([data[m][task] for m in data], axis=0)
            value += unit * difference.mean()
            variance += unit**2 * difference.var(ddof=1) / 50
        values.append(value)
        variances.append(variance)
    assert told.values == pytest.approx(values)
    assert told.variances == pytest.approx(variances)
    assert sum(told.values) == pytest.approx(0.0)


def test_what_is_hard_for_all_plans_is_no_noise():
    rng = np.random.default_rng(1)
    hard = (rng.random(40) < 0.5).astype(float)
    data = {name: {"a": hard + shift} for name, shift in (("p", 0.0), ("q", 0.1))}
    told = Measured.of(data, {"a": 1.0})
    assert told.variances == pytest.approx([0.05**2 / 40**2] * 2)
    assert told.values[1] - told.values[0] == pytest.approx(0.1)


def test_a_single_example_does_not_decide_against_many():
    rng = np.random.default_rng(2)
    many = observed(rng, {"p": 0.4, "q": 0.4, "r": 0.9}, n=60)
    before = Evidence.shrunken(Measured.of(many, UNITS), list(many))
    right = {"p": 1.0, "q": 0.0, "r": 0.0}
    single = {name: dict.fromkeys(UNITS, np.array([value])) for name, value in right.items()}
    assert before.and_measured(Measured.of(single, UNITS)).best == "r"


def test_examples_that_tell_no_plans_apart_change_nothing():
    before = Evidence(("p", "q"), np.array([0.0, 0.02]), np.array([0.001, 0.001]))
    alike = {name: {"a": np.ones(4)} for name in ("p", "q")}
    told = before.and_measured(Measured.of(alike, {"a": 1.0}))
    assert told.best == "q"
    assert told.values == pytest.approx(before.values)
    assert told.variances == pytest.approx(before.variances)


def test_a_value_is_drawn_to_the_usual_by_its_noise():
    measured = Measured(
        ("p", "q", "r"), np.array([-0.1, 0.0, 0.1]), np.array([0.001, 0.001, 0.004])
    )
    told = Evidence.shrunken(measured, ["p", "q", "r"])
    spread = 0.01 - 0.002
    assert told.values[0] == pytest.approx(-0.1 * spread / (spread + 0.001))
    assert told.values[2] == pytest.approx(0.1 * spread / (spread + 0.004))
    assert told.variances[2] == pytest.approx(spread * 0.004 / (spread + 0.004))
    assert told.best == "r"


def test_what_is_usual_is_told_by_plans_that_were_stopped_too():
    measured = Measured(("p", "q"), np.array([0.02, 0.04]), np.array([0.001, 0.001]))
    stopped = [Expected(-0.1, 0.002), Expected(-0.06, 0.004)]
    told = Evidence.shrunken(measured, ["p", "q"], stopped)
    usual = np.array([0.02, 0.04, -0.1, -0.06])
    spread = usual.var(ddof=1) + 0.006 / 4 - 0.001
    part = spread / (spread + 0.001)
    assert told.names == ("p", "q")
    assert told.values == pytest.approx(usual.mean() + part * (measured.values - usual.mean()))
    assert told.variances == pytest.approx([part * 0.001] * 2)


def test_the_luckiest_of_many_noisy_plans_does_not_beat_a_better_one_that_is_well_known():
    values = np.array([0.02, *np.linspace(-0.03, 0.03, 20)])
    names = ("published", *(f"trial {i}" for i in range(20)))
    measured = Measured(names, values, np.array([0.0, *[0.0016] * 20]))
    told = Evidence.shrunken(measured, names)
    assert measured.values.argmax() == 20
    assert told.best == "published"


def test_further_examples_count_by_their_errors():
    before = Evidence(("p", "q"), np.array([0.02, 0.0]), np.array([0.001, 0.001]))
    now = Measured(("p", "q"), np.array([-0.03, 0.03]), np.array([0.003, 0.003]))
    told = before.and_measured(now)
    assert told.values[0] - told.values[1] == pytest.approx(0.75 * 0.02 - 0.25 * 0.06)
    assert told.variances == pytest.approx([0.00075] * 2)


def test_evidence_picks_better_than_the_maximum_does():
    """Of 30 noisy plans and one that was measured on ten times the examples."""
    rng = np.random.default_rng(5)
    gains = []
    for _ in range(200):
        true = rng.normal(0.0, 0.01, 31)
        errors = np.array([0.01, *[0.04] * 30]) ** 2
        seen = Measured(tuple(map(str, range(31))), true + rng.normal(0, np.sqrt(errors)), errors)
        picked = int(Evidence.shrunken(seen, seen.names).best)
        gains.append(true[picked] - true[int(seen.values.argmax())])
    assert np.mean(gains) > 2 * np.std(gains) / np.sqrt(len(gains))


def test_of_a_plan_that_was_fitted_to_its_examples_only_further_ones_tell():
    before = Evidence(("p", "q", "r"), np.array([0.0, 0.01, 0.2]), np.full(3, 0.001))
    now = Measured(("p", "q", "r"), np.array([0.02, 0.0, 0.01]), np.full(3, 0.001))
    assert before.and_measured(now).best == "r"
    told = before.flattered(["r"]).and_measured(now)
    assert told.best == "p"
    moved = np.mean([0.0 - 0.02, 0.01 - 0.0])  # p and q agree on what is common
    assert told.values[2] == pytest.approx(0.01 + moved, abs=1e-5)


def test_what_is_believed_of_some_plans_is_what_was_believed_of_them_among_all():
    told = Evidence(("r", "s", "t"), np.array([0.1, 0.3, 0.2]), np.array([1.0, 2.0, 3.0]))
    some = told.of(["t", "r"])
    assert some.names == ("r", "t")
    assert some.values.tolist() == [0.1, 0.2]
    assert some.variances.tolist() == [1.0, 3.0]
    assert some.best == "t"

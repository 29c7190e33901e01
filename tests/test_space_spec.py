"""What a study file says of its space, and what is searched for it."""

from dataclasses import replace

import pytest

from searchmerge.errors import SpecError
from searchmerge.merging.method import METHODS
from searchmerge.search.searched import Choices, Fixed, Interval, Range, Shares
from searchmerge.study import read_study

STUDY = """
base: base
experts: {math: m, code: org/code}
tasks: {t: {split: train, expert: math}}
search: {n_trials: 50}
space:
"""


def space_of(tmp_path, text):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY + text)
    return read_study(file).space


def searched(tmp_path, text):
    [alternative] = space_of(tmp_path, text).alternatives.values()
    return alternative.values


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("coefficient", "0.5", Fixed((0.5, 0.5))),
        ("coefficient", "1e-1", Fixed((0.1, 0.1))),
        ("coefficient", "{code: 1, math: 2}", Fixed((2.0, 1.0))),
        ("density", "{low: 0.1, high: 0.5}", Range(0.1, 0.5, "all", 0.01)),
        ("density", "{low: 0.1, high: 0.5, per: expert, log: true}", Range(0.1, 0.5, log=True)),
        ("coefficient", "{scale: {low: 0.2, high: 1.0}}", Shares(0.2, 1.0)),
    ],
)
def test_the_forms_of_a_hyperparameter_are_told_apart(tmp_path, key, value, expected):
    text = f"  {{method: ties, {key}: {value}, settings: {{aggregate: [mean, sum]}}}}"
    assert searched(tmp_path, text) == {key: expected}


@pytest.mark.parametrize(
    ("value", "density"),
    [
        ("0.8", Fixed((0.2, 0.2))),
        ("{code: 0.8, math: 0.5}", Fixed((0.5, 0.2))),
        ("{low: 0.5, high: 0.9}", Range(0.1, 0.5, "all", 0.01)),
    ],
)
def test_a_drop_ratio_is_one_minus_the_density(tmp_path, value, density):
    text = f"  {{method: ties, drop_ratio: {value}, settings: {{aggregate: [mean, sum]}}}}"
    assert searched(tmp_path, text) == {"density": density}


def test_groups_give_coefficients_of_their_own(tmp_path):
    text = "  {method: ties, groups: {depth: 2}, coefficient: {low: 0, high: 1}}"
    assert sorted(space_of(tmp_path, text).distributions()) == [
        "coefficient.depth0.code",
        "coefficient.depth0.math",
        "coefficient.depth1.code",
        "coefficient.depth1.math",
    ]


def test_auto_is_the_range_that_the_method_declares(tmp_path):
    text = """
  method: ties
  coefficient: auto
  density: auto
"""
    coefficient, density = METHODS["ties"].hyperparameters
    assert searched(tmp_path, text) == {
        "coefficient": Range(*coefficient.search, "expert"),
        "density": Range(*density.search, "all", step=density.step),
    }


def test_auto_has_numbers_of_its_own_for_each_group(tmp_path):
    text = """
  method: ties
  groups: {depth: 2}
  coefficient: auto
  drop_ratio: auto
"""
    values = searched(tmp_path, text)
    assert (values["coefficient"].per, values["density"].per) == ("expert_and_group", "group")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_hyperparameter_of_every_method_may_be_auto(tmp_path, method):
    declared = METHODS[method].hyperparameters
    lines = "".join(f"  {h.name}: auto\n" for h in declared)
    values = searched(tmp_path, f"  method: {method}\n{lines}")
    ranges = {name: (of.low, of.high) for name, of in values.items()}
    assert ranges == {h.name: h.search for h in declared}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["coefficient: atuo"], r"study\.yaml:\d+: space\.coefficient: found 'atuo'; .* or auto"),
        (["densty: auto"], "space: method 'ties' has no hyper-parameter 'densty'; did you mean"),
        (["drop_ratio: {scale: {low: 0, high: 1}}"], "drop_ratio takes a number, .* or auto"),
        (
            ["density: auto", "drop_ratio: auto"],
            "give density or drop_ratio, which is 1 - density",
        ),
    ],
)
def test_a_wrong_form_is_refused_by_key(tmp_path, keys, message):
    lines = "".join(f"  {key}\n" for key in ["method: ties", *keys])
    with pytest.raises(SpecError, match=message):
        space_of(tmp_path, lines)


def test_a_methods_declaration_decides_what_is_shared_and_what_is_a_complement(
    tmp_path, monkeypatch
):
    """No name is special: any hyper-parameter may be declared like a density."""
    method = METHODS["consensus"]
    coefficient, threshold = method.hyperparameters
    declared = replace(threshold, shared=True, complement="tolerance")
    monkeypatch.setattr(method, "hyperparameters", (coefficient, declared))
    text = "  method: consensus\n  tolerance: {low: 0.25, high: 0.75}\n"
    assert searched(tmp_path, text) == {"threshold": Range(0.25, 0.75, "all")}
    text = "  method: consensus\n  coefficient: auto\n  tolerance: {math: 0.25, code: 0.5}\n"
    assert searched(tmp_path, text)["threshold"] == Fixed((0.75, 0.5))


def test_settings_are_fixed_chosen_or_a_range_in_the_settings_step(tmp_path):
    text = """
  method: dare
  coefficient: auto
  settings: {election: ties, rescale: [true, false], seed: {low: 0, high: 9}}
"""
    [alternative] = space_of(tmp_path, text).alternatives.values()
    assert alternative.settings == {
        "election": Choices(("ties",)),
        "rescale": Choices((True, False)),
        "seed": Interval(0, 9, step=1),
    }

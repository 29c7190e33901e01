"""What a study file says of its space, and what is searched for it."""

from dataclasses import replace

import pytest

from searchmerge.errors import SpecError
from searchmerge.merging.method import METHODS
from searchmerge.search.searched import Choices, Fixed, Interval, Range
from searchmerge.spec import make_space, read_study

STUDY = """
base: base
experts: {math: m, code: org/code}
tasks: {t: {split: train}}
search: {n_trials: 50}
space:
"""


def space_of(tmp_path, text):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY + text)
    return make_space(read_study(file)[0])


def searched(tmp_path, text):
    [alternative] = space_of(tmp_path, text).alternatives.values()
    return alternative.values


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

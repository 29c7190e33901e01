"""The space of a study that names none."""

import pytest

from searchmerge.merging.method import DEPTH_SLOPE, METHODS
from searchmerge.search.auto_space import EACH, auto_space

EXPERTS = ("math", "code")


def test_it_has_every_method_that_publishes_a_setting_coarse_and_fine():
    space = auto_space(EXPERTS)
    published = {m for m in METHODS if METHODS[m].published is not None} - {"linear"}
    assert space.is_auto
    assert set(space.alternatives) == published | {f"{m}{EACH}" for m in published}


@pytest.mark.parametrize("method", ["ties", "tsv"])
def test_the_coarse_alternative_has_one_number_and_the_fine_one_a_number_each(method):
    space = auto_space(EXPERTS)
    density = {"density"} if method == "ties" else set()
    coarse = {name.split(".", 1)[1] for name in space.distributions(method)}
    fine = {name.split(".", 1)[1] for name in space.distributions(f"{method}{EACH}")}
    assert coarse == {"coefficient"} | density
    each = {f"coefficient.{expert}" for expert in EXPERTS}
    assert fine == each | density | {DEPTH_SLOPE.name}


def test_ranges_are_those_that_methods_declare_good():
    space = auto_space(EXPERTS)
    low, high = METHODS["ties"].hyperparameters[0].search
    drawn = space.distributions("ties")["ties.coefficient"]
    assert (drawn.low, drawn.high) == (low, high)

"""Every method against the outputs of its authors' own code."""

import pytest

from tests.merging.golden import CASES, Case


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_every_output_of_the_authors_is_reproduced(folder, engine):
    case = Case(folder)
    assert case.outputs
    assert case.deviations(engine) == {}

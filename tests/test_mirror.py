"""Each module's tests are where one looks for them: ``x/y.py`` has its ``x/test_y.py``."""

from pathlib import Path

import pytest

import searchmerge

ROOT = Path(searchmerge.__file__).parent
TESTS = Path(__file__).parent
MODULES = {
    str(path.relative_to(ROOT)): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.name != "__init__.py"
}
ELSEWHERE = {
    # methods: every entry of the registry runs the same tests; papers' equations stand beside
    "merging/method.py": "merging/test_methods.py",
    "merging/methods": "merging/test_methods.py",
    # arithmetic for the engine, which runs it in two ways
    "merging/election.py": "merging/test_engine.py",
    "merging/kernels.py": "merging/test_engine.py",
    # wiring: a study's whole run, or its check, is what tests it
    "check.py": "test_cli.py",
    "run.py": "test_cli.py",
    "keys.py": "test_one_file.py",
    # parts of a checkpoint, which is opened and told apart as a whole
    "checkpoints/fingerprint.py": "checkpoints/test_checkpoint.py",
    "checkpoints/tensor_files.py": "checkpoints/test_checkpoint.py",
    # what a run leaves: tested on a whole run
    "report/card.py": "test_cli.py",
    "report/front.py": "test_cli.py",
    "report/results.py": "test_cli.py",
    # what the runner puts together, and tests see when it runs
    "search/candidates.py": "search/test_runner.py",
    "search/contest.py": "search/test_racing.py",
    "search/objective.py": "search/test_runner.py",
    "search/references.py": "search/test_runner.py",
    "search/schedule.py": "search/test_runner.py",
    "search/scores.py": "search/test_runner.py",
    "search/status.py": "search/test_storage.py",
    "search/study.py": "search/test_storage.py",
    "search/warm_start.py": "search/test_runner.py",
}
"""A module, or a folder of them, and what tests it instead of a file of the same name."""

NO_CODE = {"errors.py"}
"""Classes without a method."""


def mirrored(module: str) -> Path:
    place = Path(module)
    return TESTS / place.with_name(f"test_{place.name}")


def exception(module: str) -> str | None:
    """Return the test file that stands for a module's own, where one does."""
    places = (module, *(str(parent) for parent in Path(module).parents))
    return next((ELSEWHERE[place] for place in places if place in ELSEWHERE), None)


@pytest.mark.parametrize("module", MODULES)
def test_a_modules_tests_are_where_one_looks_for_them(module):
    if module in NO_CODE:
        assert "def " not in MODULES[module].read_text()
        return
    named = exception(module)
    file = TESTS / named if named else mirrored(module)
    assert file.exists(), f"write {file.relative_to(TESTS.parent)}"
    assert "\ndef test_" in file.read_text()


@pytest.mark.parametrize("module", [*ELSEWHERE, *NO_CODE])
def test_no_exception_is_left_that_is_none(module):
    assert (ROOT / module).exists(), "there is no such module: take it off the list"
    assert not mirrored(module).exists(), "it has its file now: take it off the list"

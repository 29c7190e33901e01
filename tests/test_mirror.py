"""Each module's tests are where one looks for them: ``x/y.py`` has its ``x/test_y.py``."""

import ast
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
    # wiring: a study's whole run, or its check, is what tests it
    "__main__.py": "test_cli.py",
    "check.py": "test_cli.py",
    "keys.py": "test_one_file.py",
    "evaluators/lm_harness/verification.py": "test_verify.py",
    # parts of a checkpoint, which is opened and told apart as a whole
    "checkpoints/fingerprint.py": "checkpoints/test_checkpoint.py",
    "checkpoints/tensor_files.py": "checkpoints/test_checkpoint.py",
    "checkpoints/lora_fit.py": "checkpoints/test_lora.py",
    "checkpoints/lora_layers.py": "checkpoints/test_lora.py",
    "checkpoints/lora_update.py": "checkpoints/test_lora.py",
    "checkpoints/chosen_tokenizer.py": "checkpoints/test_vocabulary.py",
    "checkpoints/made_once.py": "checkpoints/test_vocabulary.py",
    "checkpoints/model_class.py": "checkpoints/test_families.py",
    # samplers: every entry of the registry runs the same tests, and has its own where it has more
    "search/samplers": "search/test_sampler.py",
}
"""A module, or a folder of them, and what tests it instead of a file of the same name."""

NO_CODE = ("search/observer.py",)
"""Modules that only declare: classes without a method, or protocols."""


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
        nodes = ast.walk(ast.parse(MODULES[module].read_text()))
        assert not any(isinstance(node, ast.Return | ast.Raise | ast.For) for node in nodes)
        return
    file, named = mirrored(module), exception(module)
    if named and not file.exists():
        file = TESTS / named
    assert file.exists(), f"write {file.relative_to(TESTS.parent)}"
    assert "\ndef test_" in file.read_text()


@pytest.mark.parametrize("module", [*ELSEWHERE, *NO_CODE])
def test_no_exception_is_left_that_is_none(module):
    assert (ROOT / module).exists(), "there is no such module: take it off the list"
    assert not mirrored(module).exists(), "it has its file now: take it off the list"

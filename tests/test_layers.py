"""The direction of imports, and the one home that each framework has."""

import ast
from pathlib import Path

import pytest

import searchmerge

ROOT = Path(searchmerge.__file__).parent
LAYERS = [
    {"errors"},
    {"durable", "yaml_text", "tensor_names", "wording", "interrupts"},
    {"registry", "plan", "yaml_file", "machine"},
    {"checkpoints"},
    {"merging", "evaluators"},
    {"execution"},
    {"search"},
    {"keys"},
    {"space_spec"},
    {"spec", "config"},
    {"study"},
    {"report"},
    {"classifier", "estimate"},
    {"models"},
    {"heads", "watch"},
    {"fingerprint"},
    {"assemble"},
    {"run", "check", "progress"},
    {"verify", "answers"},
    {"cli"},
    {"__main__"},
]
ONLY_HERE = {
    "optuna": {"search", "run.py"},
    "ray": {"execution/ray"},
    "lm_eval": {"evaluators/lm_harness"},
    "vllm": {"evaluators/lm_harness"},
    "pydantic": {"spec.py", "space_spec.py", "keys.py", "config.py", "yaml_file.py"},
    "yaml": {"yaml_text.py", "evaluators/lm_harness"},
    "typer": {"cli.py"},
    "rich": {"cli.py", "progress.py"},
    "transformers": {"checkpoints", "evaluators", "execution/int8_merger.py"},
}
MODULES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def layer(part: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if part in names)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= (
                {f"searchmerge.{alias.name}" for alias in node.names}
                if node.module == "searchmerge"
                else {node.module or ""}
            )
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_and_frameworks_stay_at_home(path):
    place = path.relative_to(ROOT)
    here = place.parts[0].removesuffix(".py")
    for name in imported(path):
        package, *rest = name.split(".")
        if package == "searchmerge" and rest:
            assert layer(rest[0]) <= layer(here), f"{place} must not import {name}"
            if layer(rest[0]) == layer(here) and rest[0] != here:
                assert {rest[0], here} <= {"report", "spec", "config", "plan", "registry"} | {
                    "run",
                    "check",
                    "progress",
                    "yaml_file",
                }, f"{place} must not import its neighbour {name}"
        homes = ONLY_HERE.get(package)
        within = {str(place), *(str(parent) for parent in place.parents)}
        at_home = homes is None or within & homes
        assert at_home, f"{place} must not import {package}"


def test_the_merging_core_needs_only_torch_safetensors_and_numpy(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; import searchmerge; searchmerge.merge_weights; "
        "heavy = {'optuna', 'ray', 'lm_eval', 'transformers', 'pydantic', 'yaml', 'typer'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"

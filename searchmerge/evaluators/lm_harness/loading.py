"""Loading an lm-eval task for the split and the settings that a study asks for."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import yaml

from searchmerge.errors import SpecError
from searchmerge.evaluators.lm_harness.catalogue import Leaf
from searchmerge.evaluators.lm_harness.generation_keys import check_generation, draws_answers
from searchmerge.evaluators.lm_harness.keys import LmTask
from searchmerge.evaluators.lm_harness.settings import (
    data_files,
    data_folder,
    may_show_itself,
    needed_split,
    split_overrides,
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars of lm-eval and datasets, which cannot be turned off, off stderr."""
    with redirect_stderr(io.StringIO()):
        yield


def task_errors() -> tuple[type[BaseException], ...]:
    """Return what a task's own files may raise where they are wrong."""
    from jinja2 import TemplateError

    return (
        *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
        *(TypeError, ValueError, TemplateError, yaml.YAMLError, RecursionError, SystemExit),
        StopIteration,  # of a split without examples
    )


@contextmanager
def explained(name: str, what: str) -> Iterator[None]:
    """Turn what a task's own files got wrong into an error that names the task."""
    try:
        yield
    except SpecError:
        raise
    except task_errors() as error:
        reason = " ".join(str(error).split())
        raise SpecError(
            f"tasks.{name}: lm-eval could not {what} ({type(error).__name__}: {reason})"
        ) from error


def load_task(
    name: str,
    spec: LmTask,
    leaf: Leaf,
    *,
    folder: Path,
    allow_unsafe_code: bool,
    shown_itself: bool = False,
) -> Any:
    """Return lm-eval's task object, set to score the split that the study names.

    Args:
        name: The study's name of the task.
        spec: What the study says of it.
        leaf: The task in lm-eval.
        folder: The study's, from where data files of a task are found that it defines itself.
        allow_unsafe_code: Whether a task may run what a model has written.
        shown_itself: Whether an example may stand in its own few-shot prompt with its answer, as
            lm-eval lets it where the split that both come from is not called the test split.

    Raises:
        SpecError: If there is no such split, or the task cannot be scored here.
    """
    split = split_of(leaf, spec.split, f"tasks.{name}.split")
    path = None if leaf.entry is None else leaf.entry.yaml_path
    with explained(name, f"load its task {leaf.name!r}"), quiet():
        overrides = data_files(leaf.config, folder if path is None else data_folder(Path(path)))
        if spec.gen_prefix is not None:
            overrides["gen_prefix"] = spec.gen_prefix
        overrides |= needed_split(leaf.config, split)
        task = _build(leaf, overrides, split, f"tasks.{name}.split: lm-eval's {leaf.name!r}")
        if shown_itself and may_show_itself(leaf.config, split):
            more = {}
        else:
            more = split_overrides(leaf.config, split)
        if more:
            task = leaf.build(overrides | more)
    _check(task, f"tasks.{name}", leaf.name, allow_unsafe_code=allow_unsafe_code)
    if "class" in leaf.config and task.eval_docs is not task.dataset[split]:
        raise SpecError(
            f"tasks.{name}.split: {leaf.name!r} is a Python class that chooses its split itself, "
            f"and not {split!r}"
        )
    _configure(task, spec, f"tasks.{name}", leaf.name)
    return task


def _build(leaf: Leaf, overrides: Mapping[str, Any], split: str, where: str) -> Any:
    """Return lm-eval's task object, whose data has the split.

    Raises:
        SpecError: If they do not.
    """
    try:
        task = leaf.build(overrides)
    except KeyError as error:
        if error.args != (split,):
            raise
        there = ", ".join(_splits(leaf, overrides)) or "none that can be read"
        raise SpecError(f"{where} has no split {split!r} (it has: {there})") from error
    if split not in task.dataset:
        there = ", ".join(map(str, task.dataset))
        raise SpecError(f"{where} has no split {split!r} (it has: {there})")
    return task


def _splits(leaf: Leaf, overrides: Mapping[str, Any]) -> list[str]:
    """Return the splits of a task's data, which are loaded as lm-eval loads them."""
    from datasets import load_dataset

    config = {**leaf.config, **overrides}
    path, name = config.get("dataset_path"), config.get("dataset_name")
    if path is None:  # a function makes the data
        return []
    return [str(split) for split in load_dataset(path, name, **config.get("dataset_kwargs") or {})]


def split_of(leaf: Leaf, split: str | Mapping[str, Any], where: str) -> str:
    """Return the split of a task: that of its name, of the nearest group it is in, or the rest's.

    Raises:
        SpecError: If none is named for it.
    """
    if isinstance(split, str):
        return split
    for name in (leaf.name, *reversed(leaf.path), "rest"):
        if name in split:
            return str(split[name])
    raise SpecError(f"{where}: names none for {leaf.name!r} (it names: {', '.join(split)})")


def _check(task: Any, where: str, lm_name: str, *, allow_unsafe_code: bool) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise SpecError(f"{where}: {lm_name!r} is multimodal, which is not scored here")
    if getattr(task, "UNSAFE_CODE", False) and not allow_unsafe_code:
        raise SpecError(
            f"{where}: {lm_name!r} runs code that the model has written; allow it with "
            "lm_harness.confirm_run_unsafe_code: true"
        )


def _configure(task: Any, spec: LmTask, where: str, lm_name: str) -> None:
    """Put in what a study may say of a task that is loaded."""
    shots = spec.num_fewshot if spec.num_fewshot is not None else task.config.num_fewshot
    task.set_config("num_fewshot", shots or 0)
    for key in ("generation", "repeats"):
        if getattr(spec, key) is not None and task.OUTPUT_TYPE != "generate_until":
            raise SpecError(
                f"{where}.{key}: nothing is generated in {lm_name!r}, which is a "
                f"{task.OUTPUT_TYPE} task"
            )
    if spec.generation is not None:
        task.set_config("generation_kwargs", dict(spec.generation), update=True)
    generation = task.config.generation_kwargs or {}
    if task.OUTPUT_TYPE == "generate_until":
        check_generation(generation, spec.generation or {}, where)
    if spec.repeats is not None:
        if not draws_answers(generation):
            raise SpecError(
                f"{where}.repeats: {lm_name!r} does not sample its answers, so that all would be "
                "the same; give generation: {do_sample: true, temperature: ...}"
            )
        task.set_config("repeats", spec.repeats)

"""Finding lm-eval's tasks by name, and loading them for the split that a study scores."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge, MinLen

from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import needed
from searchmerge.evaluators.lm_harness.prompting import PromptKeys
from searchmerge.evaluators.lm_harness.settings import data_files, split_overrides

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LmTask(PromptKeys):
    """Which lm-eval task is scored, and how: the keys of a task of a study.

    Attributes:
        task: The task's name in lm-eval; the study's name of the task if ``None``.
        split: The split of its dataset whose examples are scored.
        metric: One of the task's metrics, or metric and filter as lm-eval's results name them:
            ``exact_match,flexible-extract``; its first if ``None``.
        filter: One of the task's filters of the model's answers; its first if ``None``.
        num_fewshot: Examples that are shown before the question, 0 or more; what the task says
            if ``None``, and 0 if it says nothing.
        samples: Positions of the split's examples that are scored; all if ``None``.
        generation: Replaces arguments of the task's generation: ``max_gen_toks``, ``until``,
            ``temperature`` and others.
    """

    task: str | None = None
    split: str = needed("name the dataset split that is scored")
    metric: str | None = None
    filter: str | None = None
    num_fewshot: Annotated[int, Ge(0)] | None = None
    samples: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(2)] | None = None
    generation: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.samples is not None and len(set(self.samples)) != len(self.samples):
            raise ValueError("samples: a position stands twice")
        if self.metric is not None and "," in self.metric and self.filter is not None:
            raise ValueError(
                f"metric {self.metric!r} names a filter, and filter another; give one"
            )

    @property
    def metric_and_filter(self) -> tuple[str | None, str | None]:
        """Return what is asked for of either."""
        metric, _, named = (self.metric or "").partition(",")
        return metric or None, named or self.filter


class Catalogue:
    """Finds lm-eval tasks by name: the user's own first, then the thousands that it brings.

    Args:
        include_path: Folders of the user's task YAMLs; a later one comes before an earlier.
        metadata: What lm-eval hands to every task that asks for it, e.g. RULER's lengths.
        allow_unsafe_code: Whether tasks are loaded that run what a model has written.
    """

    def __init__(
        self,
        include_path: Sequence[Path] = (),
        *,
        metadata: Mapping[str, Any] | None = None,
        allow_unsafe_code: bool = False,
    ) -> None:
        for folder in include_path:
            if not folder.is_dir():
                raise SpecError(f"lm_harness.include_path: no folder {folder}")
        self._include_path = [str(folder) for folder in include_path]
        self._metadata = dict(metadata or {})
        self.allow_unsafe_code = allow_unsafe_code

    @cached_property
    def _own(self) -> Any:
        return self._manager(include_defaults=False)

    @cached_property
    def _all(self) -> Any:
        _logger.info("indexing lm-eval's tasks, which takes some seconds")
        return self._manager(include_defaults=True)

    def _manager(self, *, include_defaults: bool) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(
            include_path=list(self._include_path) or None,
            include_defaults=include_defaults,
            metadata=self._metadata or None,
        )

    def find(self, name: str, where: str) -> tuple[Any, Any]:
        """Return the task manager that knows ``name``, and the task's entry in its index.

        Args:
            name: A task.
            where: Where the study names it, for messages.

        Raises:
            SpecError: If there is no such task, or it is a group of tasks.
        """
        manager = self._own if name in self._own.all_tasks else self._all
        if name in manager.all_groups or name in manager.all_tags:
            members = _members(manager, name)
            raise SpecError(
                f"{where}: {name!r} is a group of lm-eval tasks; list its tasks: {members}"
            )
        if name not in manager.all_subtasks:
            close = get_close_matches(name, manager.all_subtasks, n=3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            folders = f" or in {', '.join(self._include_path)}" if self._include_path else ""
            raise SpecError(f"{where}: no task named {name!r} in lm-eval{folders}{hint}")
        return manager, manager.task_index[name]


def _members(manager: Any, name: str) -> str:
    """Return the names of a group's or tag's direct members."""
    entry = manager.task_index[name]
    members = sorted(entry.tags) if name in manager.all_tags else (entry.cfg or {}).get("task", [])
    if isinstance(members, str):
        members = [members]
    return ", ".join(
        str(m.get("task", m.get("group"))) if isinstance(m, dict) else m for m in members
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars of lm-eval and datasets, which cannot be turned off, off stderr."""
    with redirect_stderr(io.StringIO()):
        yield


@contextmanager
def explained(name: str, what: str) -> Iterator[None]:
    """Turn what a task's own files got wrong into an error that names the task."""
    from jinja2 import TemplateError

    try:
        yield
    except SpecError:
        raise
    except (
        *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
        *(TypeError, ValueError, TemplateError, yaml.YAMLError),
    ) as error:
        raise SpecError(
            f"tasks.{name}: lm-eval could not {what} ({type(error).__name__}: {error})"
        ) from error


def load_task(name: str, spec: LmTask, catalogue: Catalogue) -> Any:
    """Return lm-eval's task object, set to score the split that the study names.

    Raises:
        SpecError: If there is no such task or split, or the task cannot be scored here.
    """
    lm_name = spec.task or name
    manager, entry = catalogue.find(lm_name, f"tasks.{name}.task")
    config = dict(entry.cfg or {})
    overrides = data_files(config, entry.yaml_path)
    if spec.gen_prefix is not None:
        overrides["gen_prefix"] = spec.gen_prefix
    with explained(name, f"load its task {lm_name!r}"), quiet():
        task = _build(manager, lm_name, overrides)
        splits = list(task.dataset)
        if spec.split not in splits:
            raise SpecError(
                f"tasks.{name}.split: lm-eval's {lm_name!r} has no split {spec.split!r} "
                f"(it has: {', '.join(map(str, splits))})"
            )
        if more := split_overrides(config, spec.split):
            task = _build(manager, lm_name, overrides | more)
    _check(task, f"tasks.{name}", lm_name, allow_unsafe_code=catalogue.allow_unsafe_code)
    if "class" in config and task.eval_docs is not task.dataset[spec.split]:
        raise SpecError(
            f"tasks.{name}.split: {lm_name!r} is a Python class that chooses its split itself, "
            f"and not {spec.split!r}"
        )
    _configure(task, spec, f"tasks.{name}")
    return task


def _check(task: Any, where: str, lm_name: str, *, allow_unsafe_code: bool) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise SpecError(f"{where}: {lm_name!r} is multimodal, which is not scored here")
    if getattr(task, "UNSAFE_CODE", False) and not allow_unsafe_code:
        raise SpecError(
            f"{where}: {lm_name!r} runs code that the model has written; allow it with "
            "lm_harness.confirm_run_unsafe_code: true"
        )


def _configure(task: Any, spec: LmTask, where: str) -> None:
    """Put in what a study may say of a task that is loaded."""
    shots = spec.num_fewshot if spec.num_fewshot is not None else task.config.num_fewshot
    task.set_config("num_fewshot", shots or 0)
    if spec.generation is None:
        return
    if task.OUTPUT_TYPE != "generate_until":
        raise SpecError(
            f"{where}.generation: nothing is generated in {spec.task!r}, which is a "
            f"{task.OUTPUT_TYPE} task"
        )
    task.set_config("generation_kwargs", dict(spec.generation), update=True)


def _build(manager: Any, name: str, overrides: Mapping[str, Any]) -> Any:
    """Return a task with settings of its YAML replaced: a group of one may do so."""
    member = {"task": name, **overrides}
    loaded = manager.load({"group": "searchmerge", "task": [member]})
    return loaded["tasks"][name]

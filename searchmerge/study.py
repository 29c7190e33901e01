"""A study: what its file says, where it is, and what follows from both."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from searchmerge.durable import write_atomically
from searchmerge.errors import SpecError, StudyError
from searchmerge.search.objective import Constraint, Goal, Objective
from searchmerge.search.references import expert_name, reference_plans
from searchmerge.search.sampler import SamplerSetting, make_sampler
from searchmerge.search.space import SearchSpace
from searchmerge.space_spec import make_space
from searchmerge.spec import StudySpec, plain_spec, study_model
from searchmerge.yaml_file import at_key, read_yaml, to_model

SPEC_FILE = "study.yaml"
KEPT_FILE = "study.json"
"""What was run, in a run directory."""


@dataclass(frozen=True)
class Study:
    """A study as it was read.

    Attributes:
        spec: What the file says.
        file: The file; paths in it are relative to its folder.
        overridden: Dotted keys whose values were given beside the file.
    """

    spec: StudySpec
    file: Path
    overridden: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Return the folder that paths are relative to."""
        return self.file.parent

    @cached_property
    def name(self) -> str:
        """Return the study's name: the one it gives itself, or that of its folder or file."""
        if self.spec.name:
            return self.spec.name
        file = self.file.resolve()
        return file.parent.name if file.name == SPEC_FILE else file.stem

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """Return the experts' names, in the order of every row of a plan."""
        return tuple(self.spec.experts)

    @cached_property
    def task_experts(self) -> dict[str, str]:
        """Return for each task with an expert what that expert alone is called in tables."""
        tasks = self.spec.tasks.items()
        return {name: expert_name(task.expert) for name, task in tasks if task.expert}

    @cached_property
    def space(self) -> SearchSpace:
        """Return what is searched.

        Raises:
            SpecError: If a range is not within its method's legal one, or a name is unknown.
        """
        return make_space(self.experts, self.spec.space)

    @cached_property
    def objective(self) -> Objective:
        """Return what is maximised, without the scores of the tasks' own experts."""
        spec = self.spec
        goals = {name: Goal(task.weight, task.expert) for name, task in spec.tasks.items()}
        constraints = tuple(
            Constraint(task, constraint.against, constraint.at_least)
            for constraint in spec.constraints
            for task in spec.constrained(constraint)
        )
        return Objective(spec.objective, goals, constraints=constraints, pick=spec.confirm.pick)

    def resolve(self, path: str) -> str:
        """Return a file or folder of the study's as a path; what is none there, as it is."""
        beside = self.folder / Path(path).expanduser()
        return str(beside) if beside.exists() else path

    def elsewhere(self) -> "Study":
        """Return the study as it is sent to another process, which may have another folder."""
        return replace(self, file=self.file.resolve())

    @contextlib.contextmanager
    def errors_at_keys(self) -> Iterator[None]:
        """Name file and line in errors that begin with a key's path."""
        try:
            yield
        except SpecError as error:
            raise SpecError(at_key(str(error), self.file, self.overridden)) from error

    def keep(self, run_dir: Path) -> None:
        """Write down in ``run_dir`` what is run, and from which folder its paths are."""
        said = self.spec.model_dump(mode="json", exclude_unset=True)
        text = json.dumps({"file": str(self.file.resolve()), "study": said}, indent=1)
        write_atomically(run_dir / KEPT_FILE, f"{text}\n")


def kept_study(run_dir: Path) -> Study:
    """Return the study that was last run in ``run_dir``, as it was read then.

    Raises:
        StudyError: If none is kept there.
    """
    try:
        kept = json.loads((run_dir / KEPT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{run_dir}: what was run is not kept here ({KEPT_FILE}); the same searchmerge run "
            "writes it, and scores nothing again"
        ) from error
    file = Path(kept["file"])
    return Study(to_model(kept["study"], study_model(), None, run_dir / KEPT_FILE), file)


def read_study(path: Path, overrides: Mapping[str, str] | None = None) -> Study:
    """Return the study in a file, or in the folder of one.

    Args:
        path: The file, or a folder that holds a ``study.yaml``.
        overrides: Dotted key to YAML text that replaces the file's value.

    Raises:
        SpecError: If it cannot be read or is not a study; it names file, line and key.
    """
    file = path / SPEC_FILE if path.is_dir() else path
    study = Study(read_yaml(file, study_model(), overrides), file, tuple(overrides or {}))
    with study.errors_at_keys():
        _check_search(study)
    return study


def plain_study(base: str, experts: Mapping[str, str], overrides: Mapping[str, str]) -> Study:
    """Return a study that names models and nothing else, for a single merge.

    Args:
        base: A directory or a hub id.
        experts: Expert name to the same.
        overrides: Dotted key of a study to YAML text, e.g. what to ``exclude``.

    Raises:
        SpecError: If a key is unknown or a value is not allowed.
    """
    return Study(plain_spec(base, experts, overrides), Path(SPEC_FILE))


def _check_search(study: Study) -> None:
    """Refuse a search that proposes nothing, or that ends before anything is searched."""
    search, space = study.spec.search, study.space
    try:
        make_sampler(search.sampler, SamplerSetting(0, space, len(study.objective.names)))
    except SpecError as error:
        message = str(error).removeprefix("search.sampler: ")
        raise SpecError(f"search.sampler: {message}") from error
    if len(space.alternatives) == 1 and not space.distributions():
        raise SpecError(
            "space: nothing is searched, all is fixed or left at its default; "
            "give a range, e.g. coefficient: {low: 0.0, high: 1.0}"
        )
    references = reference_plans(study.experts)
    inside = [name for name, plan in references.items() if space.params(plan) is not None]
    if search.n_trials is not None and search.n_trials <= len(inside):
        raise SpecError(
            f"search.n_trials is {search.n_trials}, and as many trials go to references that lie "
            f"in the space ({', '.join(inside)}); give {len(inside) + 1} or more"
        )

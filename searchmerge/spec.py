"""What a study file may say: all that may change a score."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from searchmerge.checkpoints.model_class import CAUSAL_LM, is_also
from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import EVALUATORS, EvaluatorKind, LossKind
from searchmerge.keys import Strict, declared_keys, has_key, hinted, keys_model
from searchmerge.plan import TENSOR, Groups
from searchmerge.search.objective import Against, Extent, Kind, Pick
from searchmerge.search.references import BASE
from searchmerge.space_spec import SpaceSpec
from searchmerge.yaml_file import to_model
from searchmerge.yaml_text import yaml_in_one_line

_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?\s*$")
_SECONDS = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def _seconds(value: Any) -> Any:
    if isinstance(value, str) and (match := _DURATION.match(value)):
        return float(match[1]) * _SECONDS[match[2]]
    return value


Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]
"""Seconds, or text such as ``90s``, ``30m``, ``8h``."""


class ModelSpec(Strict):
    """Where a model is: a directory, from the study file's folder on, or a hub id."""

    path: str
    revision: str | None = None


Model = Annotated[
    ModelSpec, BeforeValidator(lambda said: {"path": said} if isinstance(said, str) else said)
]

Share = Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, lt=1)]
"""A number of examples, or a part of all that there are to draw from; 1.0 is neither."""


class TaskSpec(Strict):
    """A task, how it is scored and what it counts for.

    Which other keys it has is declared by its evaluator: :func:`study_model`.
    """

    evaluator: str = "lm_harness"
    select: Share | None = None
    hold_out: Share | None = None
    weight: float = Field(default=1.0, gt=0)
    expert: str | None = None
    _keys: Any = PrivateAttr(default=None)

    @property
    def keys(self) -> Any:
        """Return the keys that the evaluator declares."""
        return self._keys

    @model_validator(mode="before")
    @classmethod
    def _suits_the_evaluator(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for key in data:
            kinds = [kind for kind in EVALUATORS if has_key(EVALUATORS[kind].keys, key)]
            if key not in cls.model_fields and kinds:
                raise ValueError(f"{key} belongs to evaluator {' or '.join(sorted(kinds))}")
        for key, hint in hinted(cls.declared).items():
            if data.get(key) is None:
                raise ValueError(f"{key} is missing: {hint}")
        return data

    @model_validator(mode="after")
    def _goes_together(self) -> "TaskSpec":
        self._keys = declared_keys(self, self.declared)
        return self


class RacingSpec(Strict):
    """When a candidate is stopped before all its blocks are scored."""

    p_threshold: float = Field(default=0.03, gt=0, lt=0.5)
    min_blocks: int = Field(default=6, ge=2)
    collapse_margin: float = Field(default=0.1, ge=0)


class RefineSpec(Strict):
    """How the best plans are refined by gradient after the search."""

    groups: Any = TENSOR
    steps: int = Field(default=20, ge=1)
    batch: int = Field(default=64, ge=1)
    shrink: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    loss: LossKind = "labels"
    rate: float = Field(default=0.05, gt=0)
    starts: int = Field(default=2, ge=1)

    @field_validator("groups")
    @classmethod
    def _divides(cls, value: Any) -> Any:
        if value != TENSOR:
            Groups.from_data(value)
        return value


class ConstraintSpec(Strict):
    """A bound that the saved plan has to keep, on some tasks or on all."""

    tasks: Annotated[list[str], Field(min_length=1)] | Literal["all"]
    against: Against = "expert"
    at_least: float


class SearchSpec(Strict):
    """What proposes candidates, and for how long."""

    sampler: str = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)
    n_trials: int | None = Field(default=None, ge=1)
    timeout: Duration | None = None
    patience: int | None = Field(default=None, ge=1)
    warm_start: list[str] = Field(default_factory=list)
    warm_start_plans: int = Field(default=10, ge=1)
    racing: RacingSpec | Literal["off"] = RacingSpec()
    refine: RefineSpec | Literal["off"] = "off"
    block_size: int = Field(default=8, ge=1)
    round_blocks: int = Field(default=12, ge=1)

    @field_validator("warm_start", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("racing", "refine", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else {} if value is True or value == "on" else value


class ConfirmSpec(Strict):
    """How the winner is confirmed on held-out examples."""

    top_k: int = Field(default=3, ge=1)
    pick: Pick = "mean"
    level: float = Field(default=0.95, gt=0.5, lt=1)
    n_resamples: int = Field(default=2000, ge=100)
    experts: Extent = "all"


def _lacks_an_expert(task: Mapping[str, Any]) -> bool:
    """Return whether a task names no expert though its evaluator needs one."""
    kind = task.get("evaluator")
    if not isinstance(kind, str) or kind not in EVALUATORS or task.get("expert") is not None:
        return False
    return "expert" in hinted(EVALUATORS[kind].keys)


class StudySpec(Strict):
    """A study file."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: Model
    experts: dict[str, Model] = Field(min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    scoring: Literal["dtype", "int8"] = "dtype"
    scores: Literal["graded", "metric"] = "graded"
    exclude: list[str] = Field(default_factory=list)
    vocabulary: Literal["same", "base", "union"] = "same"
    tokenizer: str = "base"
    chat_template: str | None = None
    tokenizers: Literal["same", "any"] = "same"
    may_differ: list[str] = Field(default_factory=list)
    trust_remote_code: bool = False
    space: SpaceSpec | list[SpaceSpec] | Literal["auto"] = "auto"
    tasks: dict[str, TaskSpec] = Field(min_length=1)
    objective: Kind = Field(default="normalised", validate_default=True)
    constraints: list[ConstraintSpec] = Field(default_factory=list)
    model_class: str | None = Field(default=None, pattern=r"^Auto[A-Za-z0-9]+$")
    search: SearchSpec = SearchSpec(n_trials=50)
    confirm: ConfirmSpec = ConfirmSpec()

    def __reduce__(self) -> Any:
        """Let it be read again in another process, whose classes are made there."""
        return _read_again, (self.model_dump(mode="json", exclude_unset=True),)

    @model_validator(mode="before")
    @classmethod
    def _experts_that_are_needed(cls, data: Any) -> Any:
        """Give a task that cannot be scored without an expert that of its name."""
        if not isinstance(data, Mapping):
            return data
        tasks, experts = data.get("tasks"), data.get("experts")
        if not isinstance(tasks, Mapping) or not isinstance(experts, Mapping):
            return data
        needing = {
            name: {**task, "expert": name}
            for name, task in tasks.items()
            if name in experts and isinstance(task, Mapping) and _lacks_an_expert(task)
        }
        return {**data, "tasks": {**tasks, **needing}}

    @field_validator("experts")
    @classmethod
    def _have_names_of_their_own(cls, experts: dict[str, Model]) -> dict[str, Model]:
        if BASE in experts:
            raise ValueError(
                f"an expert is called {BASE!r}, as the base model is wherever models are named "
                "(tokenizer, chat_template, tables, what guards a resume); give it another name"
            )
        return experts

    @field_validator("objective")
    @classmethod
    def _is_normalised_by_something(cls, objective: Kind, info: ValidationInfo) -> Kind:
        tasks, experts = info.data.get("tasks", {}), info.data.get("experts", {})
        is_raw = not any(task.expert or name in experts for name, task in tasks.items())
        if objective == "normalised" and tasks and experts and is_raw:
            raise ValueError(
                "normalised divides a task's score by its own expert's, and no task names an "
                f"expert: of its own, or is called as one (tasks: {', '.join(tasks)}; experts: "
                f"{', '.join(experts)}); name one, or use objective: mean"
            )
        return objective

    @model_validator(mode="after")
    def _experts_of_the_same_name(self) -> "StudySpec":
        if self.objective == "mean" or any(task.expert for task in self.tasks.values()):
            return self
        for name, task in self.tasks.items():
            if name in self.experts:
                self.tasks[name] = task.model_copy(update={"expert": name})
        return self

    @model_validator(mode="after")
    def _fits(self) -> "StudySpec":
        for task, spec in self.tasks.items():
            if spec.expert is not None and spec.expert not in self.experts:
                raise ValueError(
                    f"tasks.{task}.expert is {spec.expert!r}; experts are: "
                    f"{', '.join(self.experts)}"
                )
        for number, constraint in enumerate(self.constraints):
            self._check_constraint(f"constraints.{number}", constraint)
        if self.search.n_trials is None and self.search.timeout is None:
            raise ValueError("search: give n_trials, timeout, or both")
        return self

    @model_validator(mode="after")
    def _tokenizer_is_there(self) -> "StudySpec":
        if self.tokenizer not in ("base", *self.experts):
            raise ValueError(
                f"tokenizer is {self.tokenizer!r}; choose base or an expert: "
                f"{', '.join(self.experts)}"
            )
        if self.vocabulary == "union" and self.tokenizer != "base":
            raise ValueError(
                "tokenizer: with vocabulary: union it is the base's with the experts' tokens added"
            )
        return self

    @model_validator(mode="after")
    def _is_one_model(self) -> "StudySpec":
        classes = self._model_classes()
        if len(classes) > 1 and self.model_class:
            raise ValueError(
                f"model_class is {self.model_class}; the tasks need a model that is loaded as "
                f"{' or '.join(classes[1:])}"
            )
        if len(classes) > 1:
            raise ValueError(
                f"tasks: one model cannot be {' and '.join(classes)}; divide them into studies"
            )
        return self

    @property
    def kinds(self) -> dict[str, EvaluatorKind[Any, Any]]:
        """Return the kinds of evaluators that score the tasks, by name."""
        names = dict.fromkeys(task.evaluator for task in self.tasks.values())
        return {name: EVALUATORS[name] for name in names}

    def section(self, kind: str) -> Any:
        """Return the keys of the section that belongs to a kind of evaluator."""
        declared = EVALUATORS[kind].section
        return declared_keys(getattr(self, kind), declared) if hasattr(self, kind) else declared()

    def keys_of(self, kind: str) -> dict[str, Any]:
        """Return the tasks that a kind of evaluator scores: name to the keys it declares."""
        return {name: t.keys for name, t in self.tasks.items() if t.evaluator == kind}

    def _model_classes(self) -> list[str]:
        """Return the classes of transformers that the tasks need, without double."""
        classes = [self.model_class] if self.model_class else []
        for name, kind in self.kinds.items():
            section = self.section(name)
            if self.model_class not in kind.other_classes(section):
                needed = kind.model_classes(self.keys_of(name), section)
                classes += [one for one in needed if not is_also(self.model_class, one)]
        return list(dict.fromkeys(classes)) or [CAUSAL_LM]

    @property
    def resident_class(self) -> str:
        """Return the class of transformers that the resident model is loaded as."""
        return self._model_classes()[0]

    @property
    def loading(self) -> dict[str, Any]:
        """Return what else transformers is given to load the resident model."""
        given: dict[str, Any] = {}
        for name, kind in self.kinds.items():
            given |= kind.loading(self.section(name))
        return given

    @property
    def private(self) -> list[str]:
        """Return the patterns of tensors that are each expert's own though the base has them."""
        return [
            pattern
            for name, kind in EVALUATORS.items()
            if kind.private_key
            for pattern in getattr(self.section(name), kind.private_key)
        ]

    @property
    def not_merged(self) -> list[str]:
        """Return the patterns of tensors that stay the base's: excluded, or an expert's head."""
        return [*self.exclude, *self.private]

    def _check_constraint(self, where: str, constraint: ConstraintSpec) -> None:
        for task in self.constrained(constraint):
            if task not in self.tasks:
                raise ValueError(
                    f"{where}.tasks: no task {task!r}; tasks: {', '.join(self.tasks)}"
                )
            if constraint.against == "expert" and self.tasks[task].expert is None:
                raise ValueError(
                    f"{where}: task {task!r} names no expert: of its own to be held against; "
                    "give it one, or use against: base or score"
                )

    def constrained(self, constraint: ConstraintSpec) -> list[str]:
        """Return the tasks that a constraint is on."""
        return list(self.tasks) if constraint.tasks == "all" else constraint.tasks

    def canonical(self) -> dict[str, Any]:
        """Return what may change a score: all but the budget and the confirmation."""
        data: dict[str, Any] = self.model_dump(mode="json", exclude={"confirm", "name"})
        budget = ("n_trials", "timeout", "patience", "warm_start", "warm_start_plans", "refine")
        for key in budget:
            data["search"].pop(key)
        tasks = data["tasks"].values()
        for name, kind in EVALUATORS.items():
            if name not in self.kinds and name not in self.model_fields_set:
                data.pop(name, None)  # so that a new kind of evaluator changes no other study
                continue
            for key in kind.free_keys:
                for keys in (data.get(name, {}), *(t for t in tasks if t["evaluator"] == name)):
                    keys.pop(key, None)
        return data


def study_model() -> type[StudySpec]:
    """Return the model of a study file, with the keys that each kind of evaluator declares."""
    return _study_model(tuple(EVALUATORS))


@cache
def _study_model(kinds: tuple[str, ...]) -> type[StudySpec]:
    forms = tuple(
        Annotated[keys_model(f"{kind}Task", EVALUATORS[kind].keys, TaskSpec), Tag(f"({kind})")]
        for kind in kinds
    )
    task = Annotated[
        Annotated[Union[forms], Discriminator(_form_of_task)],  # type: ignore[valid-type]  # noqa: UP007
        BeforeValidator(_with_known_evaluator),
    ]
    sections = {
        kind: keys_model(f"{kind}Section", EVALUATORS[kind].section, Strict) for kind in kinds
    }
    keys: dict[str, Any] = {
        kind: (section, Field(default_factory=section))
        for kind, section in sections.items()
        if section.model_fields
    }
    tasks = (dict[str, task], Field(min_length=1))
    return create_model("Study", __base__=StudySpec, tasks=tasks, **keys)


def _form_of_task(task: Any) -> str:
    return f"({_evaluator_of(task)})"


def _evaluator_of(task: Any) -> Any:
    default = TaskSpec.model_fields["evaluator"].default
    if isinstance(task, Mapping):
        return task.get("evaluator", default)
    return getattr(task, "evaluator", default)


def _with_known_evaluator(task: Any) -> Any:
    EVALUATORS[_evaluator_of(task)]
    return task


def _read_again(data: dict[str, Any]) -> StudySpec:
    return study_model().model_validate(data)


def plain_spec(base: str, experts: Mapping[str, str], overrides: Mapping[str, str]) -> StudySpec:
    """Return what a study would say that names models and nothing else.

    Raises:
        SpecError: If a key is unknown, a value is not allowed, or a model would be another.
    """
    data = {
        "base": base,
        "experts": dict(experts),
        "space": {"method": "task_arithmetic"},
        "tasks": {"none": {"split": "none"}},
        "objective": "mean",
    }
    spec = to_model(data, study_model(), overrides, "--set")
    asked = {"base": base, **{f"experts.{name}": path for name, path in experts.items()}}
    models = {"base": spec.base, **{f"experts.{name}": m for name, m in spec.experts.items()}}
    for key, model in models.items():
        if model.path != asked.get(key):
            raise SpecError(
                f"--set {key}: names {model.path!r}; the models are those of --base and --expert"
            )
    return spec


def merge_overrides(spec: StudySpec) -> dict[str, str]:
    """Return the overrides with which :func:`plain_spec` merges as a study does."""
    said = spec.model_dump(mode="json", exclude_unset=True)
    keys = (
        *("dtype", "exclude", "vocabulary", "tokenizer", "chat_template", "tokenizers"),
        *("may_differ", "trust_remote_code"),
    )
    overrides = {key: said[key] for key in keys if key in said}
    for name, kind in EVALUATORS.items():
        if kind.private_key and (patterns := getattr(spec.section(name), kind.private_key)):
            overrides[f"{name}.{kind.private_key}"] = list(patterns)
    models = {"base": spec.base, **{f"experts.{name}": m for name, m in spec.experts.items()}}
    overrides |= {key: m.model_dump(mode="json") for key, m in models.items() if m.revision}
    return {key: yaml_in_one_line(value) for key, value in overrides.items()}

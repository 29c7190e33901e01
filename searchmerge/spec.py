"""What a study file may say: all that may change a score."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from searchmerge.checkpoints.model_class import CAUSAL_LM, LANGUAGE_MODELS
from searchmerge.errors import SpecError
from searchmerge.merging.method import METHODS
from searchmerge.plan import WHOLE, Groups, Setting
from searchmerge.search.objective import Against, Kind, Pick
from searchmerge.search.references import reference_plans
from searchmerge.search.samplers import SamplerSetting, make_sampler
from searchmerge.search.space import Alternative, Fixed, Per, Range, SearchSpace, Shares
from searchmerge.yaml_file import read_yaml, to_model

STUDY_FILE = "study.yaml"
DTYPES = ("bfloat16", "float16", "float32")
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?\s*$")
_SECONDS = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _seconds(value: Any) -> Any:
    if isinstance(value, str) and (match := _DURATION.match(value)):
        return float(match[1]) * _SECONDS[match[2]]
    return value


Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]
"""Seconds, or text such as ``90s``, ``30m``, ``8h``."""


class ModelSpec(_Strict):
    """Where a model is: a directory, from the study file's folder on, or a hub id."""

    path: str
    revision: str | None = None


def _model(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Model = Annotated[ModelSpec, BeforeValidator(_model)]


class RangeSpec(_Strict):
    """A range to search, both ends included."""

    low: float
    high: float
    per: Per | None = None
    step: float | None = Field(default=None, gt=0)
    log: bool = False


class EndsSpec(_Strict):
    """A range of real numbers to search, both ends included."""

    low: float
    high: float


class ScaleSpec(_Strict):
    """One scale for all experts, times each one's share of it."""

    scale: EndsSpec


def _form(value: Any) -> str:
    """Return which form a searched hyper-parameter has, so that errors speak of that one."""
    if isinstance(value, ScaleSpec) or (isinstance(value, dict) and "scale" in value):
        return "a scale"
    if isinstance(value, RangeSpec) or (
        isinstance(value, dict) and value.keys() & {"low", "high"}
    ):
        return "a range"
    return "one per expert" if isinstance(value, dict) else "a number"


Searched = Annotated[
    Annotated[float, Tag("a number")]
    | Annotated[dict[str, float], Tag("one per expert")]
    | Annotated[ScaleSpec, Tag("a scale")]
    | Annotated[RangeSpec, Tag("a range")],
    Discriminator(_form),
]


class SpaceSpec(BaseModel):
    """One method and what is searched of it; every other key is one of its hyper-parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    __pydantic_extra__: dict[str, Searched]
    method: str
    name: str | None = None
    groups: Any = "whole"
    settings: dict[str, Setting | list[Setting] | RangeSpec] = Field(default_factory=dict)


class DataSpec(_Strict):
    """Where a task's rows are: a file or folder, from the study file's folder on, or a hub id."""

    path: str
    subset: str | None = None
    revision: str | None = None


Data = Annotated[DataSpec, BeforeValidator(_model)]
Columns = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(min_length=1, max_length=2),
]
"""The column of a text, or the two columns of a pair."""

_TASK_KEYS: dict[str, tuple[str, ...]] = {
    "lm_harness": ("task", "split", "metric", "num_fewshot"),
    "classification": ("data", "split", "text", "image", "label", "labels", "metric"),
    "perplexity": ("data", "split", "text"),
    "function": ("function", "n_examples"),
}
"""The keys of a task that belong to some evaluators only."""


class TaskSpec(_Strict):
    """A task, how it is scored and what it counts for."""

    evaluator: Literal["lm_harness", "classification", "perplexity", "function"] = "lm_harness"
    select: int | None = Field(default=None, ge=1)
    hold_out: int | None = Field(default=None, ge=1)
    weight: float = Field(default=1.0, gt=0)
    expert: str | None = None
    task: str | None = None
    split: str | None = None
    metric: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    data: Data | None = None
    text: Columns | None = None
    image: str | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    function: str | None = None
    n_examples: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _belongs(self) -> "TaskSpec":
        allowed = _TASK_KEYS[self.evaluator]
        for evaluator, keys in _TASK_KEYS.items():
            for key in keys:
                if key not in allowed and getattr(self, key) is not None:
                    raise ValueError(f"{key} belongs to evaluator {evaluator}")
        if (wrong := self._missing()) is not None:
            raise ValueError(wrong)
        return self

    def _missing(self) -> str | None:
        """Return what this kind of task still needs."""
        match self.evaluator:
            case "lm_harness" if self.split is None:
                return "split is missing: name the dataset split that is scored"
            case "function" if self.function is None or self.n_examples is None:
                return "function (module:function) and n_examples are needed"
            case "classification" | "perplexity" if self.data is None:
                return "data is missing: a file, a folder, or a dataset of the hub"
            case "perplexity" if len(self.text or ("text",)) > 1:
                return "text: perplexity reads one column"
            case "classification" if self.expert is None:
                return "expert is missing: name the expert whose head classifies"
            case "classification" if (self.text is None) == (self.image is None):
                return "name the column of the data that is classified: text, or image"
            case "classification" if self.metric not in (None, "acc", "macro_f1"):
                return f"metric is {self.metric!r}; classification has: acc, macro_f1"
        return None


class LmHarnessSpec(_Strict):
    """How lm-eval tasks are scored."""

    include_path: str | None = None
    batch_tokens: int | None = Field(default=None, ge=64)
    max_length: int | None = Field(default=None, ge=2)
    fewshot_seed: int = 1234
    engine: Literal["transformers", "vllm"] = "transformers"
    vllm_memory: float = Field(default=0.5, gt=0, lt=1)


class ClassificationSpec(_Strict):
    """How classifiers are scored, and which tensors are their experts' own heads.

    Without ``pooling`` the model is the base's ``AutoModelForSequenceClassification`` or
    ``AutoModelForImageClassification``, and each expert's head is put into it. With ``pooling``
    it is its ``AutoModel``, and a head is a linear layer on the pooled output.
    """

    pooling: Literal["mean", "cls", "max", "pooler"] | None = None
    heads: tuple[str, ...] = ()
    batch_tokens: int | None = Field(default=None, ge=64)
    batch_images: int | None = Field(default=None, ge=1)
    max_length: int | None = Field(default=None, ge=2)


class PerplexitySpec(_Strict):
    """How texts are scored by their likelihood."""

    batch_tokens: int | None = Field(default=None, ge=64)
    max_length: int | None = Field(default=None, ge=2)
    stride: int | None = Field(default=None, ge=1)


class RacingSpec(_Strict):
    """When a candidate is stopped before all its blocks are scored."""

    p_threshold: float = Field(default=0.03, gt=0, lt=0.5)
    min_blocks: int = Field(default=6, ge=2)
    collapse_margin: float = Field(default=0.1, ge=0)


class ConstraintSpec(_Strict):
    """A bound that the saved plan has to keep, on some tasks or on all."""

    tasks: Annotated[list[str], Field(min_length=1)] | Literal["all"]
    against: Against = "expert"
    at_least: float


class SearchSpec(_Strict):
    """What proposes candidates, and for how long."""

    sampler: str = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)
    n_trials: int | None = Field(default=None, ge=1)
    timeout: Duration | None = None
    patience: int | None = Field(default=None, ge=1)
    warm_start: list[str] = Field(default_factory=list)
    warm_start_plans: int = Field(default=10, ge=1)
    racing: RacingSpec | Literal["off"] = RacingSpec()
    block_size: int = Field(default=8, ge=1)
    round_blocks: int = Field(default=12, ge=1)

    @field_validator("warm_start", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("racing", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else {} if value is True or value == "on" else value


class ConfirmSpec(_Strict):
    """How the winner is confirmed on held-out examples."""

    top_k: int = Field(default=3, ge=1)
    pick: Pick = "mean"
    level: float = Field(default=0.95, gt=0.5, lt=1)
    n_resamples: int = Field(default=2000, ge=100)


class StudySpec(_Strict):
    """A study file."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: Model
    experts: dict[str, Model] = Field(min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    scoring: Literal["dtype", "int8"] = "dtype"
    exclude: list[str] = Field(default_factory=list)
    vocabulary: Literal["same", "base"] = "same"
    tokenizers: Literal["same", "any"] = "same"
    may_differ: list[str] = Field(default_factory=list)
    trust_remote_code: bool = False
    space: SpaceSpec | list[SpaceSpec]
    tasks: dict[str, TaskSpec] = Field(min_length=1)
    objective: Kind = "normalised"
    constraints: list[ConstraintSpec] = Field(default_factory=list)
    lm_harness: LmHarnessSpec = LmHarnessSpec()
    classification: ClassificationSpec = ClassificationSpec()
    perplexity: PerplexitySpec = PerplexitySpec()
    model_class: str | None = Field(default=None, pattern=r"^Auto[A-Za-z0-9]+$")
    search: SearchSpec = SearchSpec(n_trials=50)
    confirm: ConfirmSpec = ConfirmSpec()

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
        if len(kinds := self._model_classes()) > 1:
            raise ValueError(
                f"tasks: one model cannot be {' and '.join(kinds)}; divide them into studies"
            )
        return self

    def _model_classes(self) -> list[str]:
        """Return the classes of transformers that the tasks need, without double."""
        found = [self.model_class] if self.model_class else []
        language = self.model_class if self.model_class in LANGUAGE_MODELS else CAUSAL_LM
        for task in self.tasks.values():
            if task.evaluator in ("lm_harness", "perplexity"):
                found.append(str(language))
            elif task.evaluator == "classification" and self.classification.pooling:
                found.append("AutoModel")
            elif task.evaluator == "classification":
                kind = "Sequence" if task.text else "Image"
                found.append(f"AutoModelFor{kind}Classification")
        return list(dict.fromkeys(found)) or [CAUSAL_LM]

    @property
    def resident_class(self) -> str:
        """Return the class of transformers that the resident model is loaded as."""
        return self._model_classes()[0]

    @property
    def not_merged(self) -> list[str]:
        """Return the patterns of tensors that stay the base's: excluded, or an expert's head."""
        return [*self.exclude, *self.classification.heads]

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

    @property
    def alternatives(self) -> list[SpaceSpec]:
        """Return the methods of the space."""
        return self.space if isinstance(self.space, list) else [self.space]

    def canonical(self) -> dict[str, Any]:
        """Return what may change a score: all but the budget and the confirmation."""
        data: dict[str, Any] = self.model_dump(mode="json", exclude={"confirm", "name"})
        for key in ("n_trials", "timeout", "patience", "warm_start", "warm_start_plans"):
            data["search"].pop(key)
        data["lm_harness"].pop("vllm_memory")
        return data


def read_study(path: Path, overrides: dict[str, str] | None = None) -> tuple[StudySpec, Path]:
    """Return the study in a file, or in the folder of one, and the file.

    Raises:
        SpecError: If it cannot be read or is not a study; it names file, line and key.
    """
    file = path / STUDY_FILE if path.is_dir() else path
    spec = read_yaml(file, StudySpec, overrides)
    try:
        space = make_space(spec)
        n_objectives = len(spec.tasks) if spec.objective == "tasks" else 1
        make_sampler(spec.search.sampler, SamplerSetting(0, space, n_objectives))
        if len(space.alternatives) == 1 and not space.distributions():
            raise SpecError(
                "space: nothing is searched, all is fixed or left at its default; "
                "give a range, e.g. coefficient: {low: 0.0, high: 1.0}"
            )
        _check_length(spec, space)
    except SpecError as error:
        raise SpecError(f"{file}: {error}") from error
    return spec, file


def _check_length(spec: StudySpec, space: SearchSpace) -> None:
    """Refuse a search that ends with the references that lie in its space, trials as well."""
    references = reference_plans(tuple(spec.experts))
    inside = [name for name, plan in references.items() if space.params(plan) is not None]
    n_trials = spec.search.n_trials
    if n_trials is not None and n_trials <= len(inside):
        raise SpecError(
            f"search.n_trials is {n_trials}, and as many trials go to references that lie in the "
            f"space ({', '.join(inside)}); give {len(inside) + 1} or more"
        )


def make_space(spec: StudySpec) -> SearchSpace:
    """Return the search space of a study.

    Raises:
        SpecError: If a range is not within its method's legal one, or a name is unknown.
    """
    experts = tuple(spec.experts)
    alternatives = []
    for number, one in enumerate(spec.alternatives):
        where = f"space.{number}" if isinstance(spec.space, list) else "space"
        try:
            alternatives.append(_alternative(one, experts))
        except SpecError as error:
            raise SpecError(f"{where}: {str(error).removeprefix('space: ')}") from error
    return SearchSpace(experts, alternatives)


def _alternative(spec: SpaceSpec, experts: tuple[str, ...]) -> Alternative:
    hyperparameters = {h.name: h for h in METHODS[spec.method].hyperparameters}
    groups = Groups.from_data(spec.groups)
    values = {}
    for key, searched in (spec.__pydantic_extra__ or {}).items():
        name, searched = _density(key, searched)
        if name in values:
            raise SpecError("space: give density or drop_ratio, which is 1 - density, not both")
        step = hyperparameters[name].step if name in hyperparameters else None
        values[name] = _searched(name, searched, experts, groups, step)
    steps = {setting.name: setting.step for setting in METHODS[spec.method].settings}
    settings: dict[str, tuple[Setting, ...] | Range] = {}
    for key, choice in spec.settings.items():
        if isinstance(choice, RangeSpec):
            step = choice.step or steps.get(key)
            settings[key] = Range(choice.low, choice.high, step=step, log=choice.log)
        else:
            settings[key] = tuple(choice) if isinstance(choice, list) else (choice,)
    return Alternative(spec.name or spec.method, spec.method, groups, values, settings)


def _density(key: str, searched: Searched) -> tuple[str, Searched]:
    """Return a drop ratio as the density that it is: 1 - drop ratio."""
    if key != "drop_ratio":
        return key, searched
    match searched:
        case RangeSpec(low=low, high=high):
            ends = {"low": _complement(high), "high": _complement(low)}
            return "density", searched.model_copy(update=ends)
        case dict():
            return "density", {expert: _complement(n) for expert, n in searched.items()}
        case float() | int():
            return "density", _complement(searched)
    raise SpecError("space: drop_ratio takes a number, one per expert, or a range")


def _complement(ratio: float) -> float:
    return round(1.0 - ratio, 12)


def _searched(
    name: str, searched: Searched, experts: tuple[str, ...], groups: Groups, step: float | None
) -> Fixed | Range | Shares:
    match searched:
        case RangeSpec(low=low, high=high, per=per, log=log):
            if per is None:
                per = "expert" if groups == WHOLE else "expert_and_group"
                per = ("all" if groups == WHOLE else "group") if name == "density" else per
            return Range(low, high, per, searched.step or (None if log else step), log)
        case ScaleSpec(scale=scale):
            return Shares(scale.low, scale.high)
        case dict():
            if set(searched) != set(experts):
                raise SpecError(
                    f"space: {name} names {', '.join(searched)}; "
                    f"one number per expert is needed: {', '.join(experts)}"
                )
            return Fixed(tuple(float(searched[expert]) for expert in experts))
    return Fixed((float(searched),) * len(experts))


def plain_study(base: str, experts: Mapping[str, str], overrides: Mapping[str, str]) -> StudySpec:
    """Return a study that names models and nothing else, for a single merge.

    Args:
        base: A directory or a hub id.
        experts: Expert name to the same.
        overrides: Dotted key of a study to YAML text, e.g. what to ``exclude``.

    Raises:
        SpecError: If a key is unknown or a value is not allowed.
    """
    data = {
        "base": base,
        "experts": dict(experts),
        "space": {"method": "task_arithmetic"},
        "tasks": {"none": {"split": "none"}},
    }
    return to_model(data, StudySpec, overrides, "--set")


def merge_overrides(spec: StudySpec) -> dict[str, str]:
    """Return the overrides with which :func:`plain_study` merges as a study does."""
    said = spec.model_dump(mode="json", exclude_unset=True)
    keys = ("dtype", "exclude", "vocabulary", "tokenizers", "may_differ", "trust_remote_code")
    found = {key: said[key] for key in keys if key in said}
    if heads := spec.classification.heads:
        found["classification.heads"] = heads
    models = {"base": spec.base, **{f"experts.{name}": m for name, m in spec.experts.items()}}
    found |= {key: m.model_dump(mode="json") for key, m in models.items() if m.revision}
    return {key: _in_one_line(value) for key, value in found.items()}


def _in_one_line(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").strip()

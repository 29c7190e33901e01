"""A new evaluator, merge method or sampler is one file: this one, and nothing else is touched."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import pytest
import torch
from annotated_types import Ge
from optuna.samplers import RandomSampler

from searchmerge.config import RunConfig
from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import EVALUATORS, EvaluatorKind, TaskInfo, needed
from searchmerge.merging.kernels import Numbers, unpack
from searchmerge.merging.method import DEPTH_SLOPE, METHODS, Hyperparameter, Pass, by_group
from searchmerge.plan import MergePlan
from searchmerge.run import run_study
from searchmerge.search.sampler import SAMPLERS
from searchmerge.study import read_study
from tests.search.conftest import Recorder
from tests.tiny import make_models, make_study


@dataclass(frozen=True)
class NormKeys:
    """The keys of a task: which tensor's norm is looked at."""

    tensor: str = needed("name a tensor of the model")
    n_entries: Annotated[int, Ge(2)] = 32


@dataclass(frozen=True)
class NormSection:
    """The section of a study."""

    power: float = 1.0


class SmallNorm:
    """Scores the entries of a tensor: the smaller, the better."""

    def __init__(self, tasks: Mapping[str, NormKeys], power: float) -> None:
        self._tasks, self._power = tasks, power
        self.tasks = {name: TaskInfo(t.n_entries, metric="small") for name, t in tasks.items()}

    def score(self, model, task, examples):
        entries = model.get_parameter(self._tasks[task].tensor).detach().flatten().float()
        return tuple(2.0 - float(abs(entries[e]) ** self._power) for e in examples)


EVALUATORS.register("small_norm")(
    EvaluatorKind(
        keys=NormKeys,
        section=NormSection,
        build=lambda tasks, section, context: dict.fromkeys(
            tasks, SmallNorm(tasks, section.power)
        ),
        model_classes=lambda tasks, section: (),
    )
)


class FirstScalars(NamedTuple):
    """What the arithmetic reads of each expert."""

    fractions: Numbers


@METHODS.register("first_only")
class FirstOnly:
    """Merge a fraction of the first expert."""

    hyperparameters = (Hyperparameter("fraction", 0.0, 1.0, default=0.5),)
    settings = (DEPTH_SLOPE,)
    scope = "entry"
    published = None

    def __init__(self, measure):
        self._names = measure.names

    def bind(self, plan: MergePlan) -> Pass:
        scalars = [FirstScalars(row) for row in plan.values["fraction"]]
        return Pass(scaled_first, by_group(plan, self._names, scalars))


def scaled_first(chunk):
    return (chunk.deltas[0].mul_(unpack(FirstScalars, chunk).fractions[0]),)


@SAMPLERS.register("fair_dice")
def fair_dice(setting):
    return RandomSampler(seed=setting.fresh_seed)


CHANGES = {
    "space": {"method": "first_only", "fraction": {"low": 0.0, "high": 1.0, "per": "all"}},
    "tasks": {"norm": {"evaluator": "small_norm", "tensor": "model.norm.weight", "n_entries": 16}},
    "small_norm": {"power": 2.0},
    "search": {"sampler": "fair_dice", "n_trials": 4, "racing": "off"},
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path / "cache"))
    make_models(tmp_path)
    return lambda **changes: make_study(tmp_path, **{**CHANGES, **changes})


def test_a_toy_evaluator_method_and_sampler_run_a_study_from_its_file(write, tmp_path):
    seen = Recorder()
    results = run_study(
        read_study(write()), RunConfig(engine="eager", device="cpu"), tmp_path / "run", seen
    )
    assert results.tasks == {"norm": "small"}
    assert len(seen.trials) == 4
    assert MergePlan.from_dict(results.plan).method == "first_only"
    from safetensors.torch import load_file

    base, first, saved = (
        load_file(tmp_path / folder / "model.safetensors")["model.norm.weight"]
        for folder in ("base", "first", "run/model")
    )
    [[fraction, _]] = results.plan["values"]["fraction"]
    assert torch.allclose(saved, base + fraction * (first - base), atol=1e-6)
    row = next(row for row in results.rows if row.name == results.winner)
    scored = results.counts["select examples"] + results.counts["hold-out examples"]
    both = 0.5 * (row.select["norm"] + row.hold_out["norm"])
    assert scored == 16
    assert both == pytest.approx(2.0 - float((saved**2)[:16].mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"norm": {"evaluator": "small_norm"}}}, "tensor is missing: name a tensor of"),
        (
            {"tasks": {"norm": {"evaluator": "small_norm", "tensor": "t", "n_entries": 1}}},
            r"study\.yaml:\d+: tasks\.norm\.n_entries: .*greater than or equal to 2; found 1",
        ),
        (
            {"tasks": {"norm": {"evaluator": "small_norm", "tensor": "t", "tensors": 1}}},
            r"tasks\.norm\.tensors: unknown key; did you mean 'tensor'",
        ),
        (
            {"tasks": {"norm": {"evaluator": "small_norm", "tensor": "t", "num_fewshot": 1}}},
            "num_fewshot belongs to evaluator lm_harness",
        ),
        ({"small_norm": {"pwer": 1.0}}, r"small_norm\.pwer: unknown key; did you mean 'power'"),
        (
            {"tasks": {"norm": {"evaluator": "smal_norm", "tensor": "t"}}},
            r"study\.yaml:\d+: tasks\.norm: no evaluator named 'smal_norm'; did you mean 'small",
        ),
    ],
)
def test_its_keys_are_checked_like_all_others(write, changes, message):
    with pytest.raises(SpecError, match=message):
        read_study(write(**changes))


def test_no_other_study_is_changed_by_them(write):
    texts = {"texts": {"evaluator": "perplexity", "data": "texts.txt"}}
    file = write(tasks=texts, space={"method": "ties", "density": {"low": 0.1, "high": 1.0}})
    file.write_text(file.read_text().replace("small_norm:\n  power: 2.0\n", ""))
    sections = read_study(file).spec.canonical().keys() & set(EVALUATORS)
    assert sections == {"perplexity", "lm_harness"}  # the file has a section of the latter

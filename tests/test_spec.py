"""Study files: what they mean, and what is said of a wrong one."""

import math
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from searchmerge.config import read_config
from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import EVALUATORS
from searchmerge.keys import Strict, keys_model
from searchmerge.spec import StudySpec, study_model
from searchmerge.study import read_study

ROOT = Path(__file__).parent.parent
STUDY = {
    "base": "base",
    "experts": {"math": "m", "code": "org/code"},
    "space": {"method": "ties", "coefficient": {"low": 0.0, "high": 2.0}},
    "tasks": {"t": {"split": "train"}},
    "objective": "mean",
}


def read(tmp_path, overrides=None, **changes):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return read_study(file, overrides).spec


STUDIES = {file.parent.name: file for file in sorted(ROOT.glob("studies/*/study.yaml"))}
CONFIGS = {file.stem: file for file in sorted(ROOT.glob("configs/*.yaml"))}


def test_there_are_studies_and_configs_to_read():
    assert {"quickstart", "encoder"} <= STUDIES.keys()
    assert {"local", "ray-local", "ray-cluster"} <= CONFIGS.keys()


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_of_the_repository_is_read(name):
    written = yaml.safe_load(STUDIES[name].read_text())
    study = read_study(STUDIES[name])
    assert study.space.is_auto == (written["space"] == "auto")
    if not study.space.is_auto:
        space = written["space"] if isinstance(written["space"], list) else [written["space"]]
        methods = {alternative.method for alternative in study.space.alternatives.values()}
        assert methods == {entry["method"] for entry in space}
    assert study.experts == tuple(written["experts"])


def test_an_expert_is_not_called_as_the_base_is(tmp_path):
    with pytest.raises(SpecError, match=r"study\.yaml:2: experts: an expert is called 'base'"):
        read(tmp_path, experts={"math": "m", "base": "b"})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_of_the_repository_is_read(name):
    config = read_config(CONFIGS[name])
    written = yaml.safe_load(CONFIGS[name].read_text()) or {}
    assert config.executor == ("ray" if name.startswith("ray") else "local")
    assert config.model_dump(exclude_unset=True, include=set(written)) == written


def test_the_readmes_study_is_read():
    text = (ROOT / "README.md").read_text()
    [block] = [b for b in text.split("```yaml")[1:] if b.lstrip().startswith("base:")]
    data = yaml.safe_load(block.split("```")[0])
    assert set(data) <= set(study_model().model_fields)
    study_model().model_validate(data)


def test_the_readmes_other_tasks_are_read():
    text = (ROOT / "README.md").read_text()
    [block] = [b for b in text.split("```yaml")[1:] if b.lstrip().startswith("tasks:")]
    data = yaml.safe_load(block.split("```")[0])
    tasks = data.pop("tasks")
    study = study_model()
    assert set(data) <= set(study.model_fields)
    for name, task in tasks.items():
        own = {} if name == "sentiment" else {"model_class": "AutoModelForCausalLM"}
        experts = {"sentiment": "s"}
        found = study.model_validate(
            STUDY | data | own | {"experts": experts, "tasks": {name: task}}
        )
        assert found.resident_class == ("AutoModel" if name == "sentiment" else own["model_class"])


def keys_within(model):
    """Yield the keys of a mapping, and of the mappings in it."""
    for key, field in model.model_fields.items():
        yield key
        waiting = [field.annotation]
        while waiting:
            kind = waiting.pop()
            waiting += get_args(kind)
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys_within(kind)


def test_the_readme_names_every_key_of_a_study():
    words = set(re.findall(r"\w+", (ROOT / "README.md").read_text()))
    kinds = [k for k in EVALUATORS.values() if k.keys.__module__.startswith("searchmerge.")]
    models = [StudySpec]
    models += [keys_model("Keys", keys, Strict) for k in kinds for keys in (k.keys, k.section)]
    keys = {key for model in models for key in keys_within(model)}
    assert {"may_differ", "round_blocks", "gen_prefix", "stride", "per"} <= keys
    assert keys <= words


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("8h", 28800), (5, 5)])
def test_a_timeout_may_have_a_unit(tmp_path, text, seconds):
    assert read(tmp_path, search={"timeout": text}).search.timeout == seconds


def test_budget_and_confirmation_are_no_part_of_what_guards_a_resume(tmp_path):
    one = read(tmp_path, search={"n_trials": 5})
    more = read(tmp_path, search={"n_trials": 50, "timeout": "1h"}, confirm={"top_k": 7})
    assert one.canonical() == more.canonical()
    other = read(tmp_path, search={"n_trials": 5, "seed": 1})
    assert one.canonical() != other.canonical()


def test_overrides_replace_values_of_the_file(tmp_path):
    spec = read(tmp_path, {"search.n_trials": "7", "tasks.t.weight": "2.5", "dtype": "bfloat16"})
    assert (spec.search.n_trials, spec.tasks["t"].weight, spec.dtype) == (7, 2.5, "bfloat16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serch": {}}, r"study\.yaml:\d+: serch: unknown key; did you mean 'search'"),
        ({"search": {"n_trial": 5}}, r"search\.n_trial: unknown key; did you mean 'n_trials'"),
        ({"search": {"n_trials": 0}}, r"search\.n_trials: .*greater than or equal to 1; found 0"),
        ({"search": {"sampler": "tpee", "n_trials": 1}}, "no sampler named 'tpee'"),
        ({"search": {"sampler": "tpe"}}, "give n_trials, timeout, or both"),
        (
            {
                "search": {"sampler": "cma_es", "n_trials": 1},
                "objective": "tasks",
                "tasks": {"t": {"split": "train"}, "u": {"split": "train"}},
            },
            "one objective",
        ),
        ({"dtype": "fp8"}, r"dtype: .*found 'fp8'"),
        ({"space": {"method": "ties", "density": {"low": "x", "high": 1}}}, "density"),
        ({"space": {"method": "ties", "densty": 0.5}}, "no hyper-parameter 'densty'"),
        ({"space": {"method": "ties", "coefficient": {"math": 1}}}, "one number per expert"),
        ({"space": {"method": "ties", "drop_ratio": {"low": -1, "high": 0}}}, "is not within"),
        ({"tasks": {}}, r"tasks: .*at least 1"),
        ({"tasks": {"t": {}}}, "split is missing"),
        (
            {"tasks": {"t": {"split": "train", "n_examples": 4}}},
            "n_examples belongs to evaluator function",
        ),
        (
            {"tasks": {"t": {"evaluator": "function"}}},
            "function is missing: name your function",
        ),
        (
            {"tasks": {"t": {"split": {"select": "train"}}}},
            r"tasks\.t: split: select and hold_out stand together and alone; found select",
        ),
        (
            {"tasks": {"t": {"evaluator": "perplexity", "data": {"select": "a.txt"}}}},
            r"tasks\.t\.data\.hold_out: Field required",
        ),
        (
            {"tasks": {"t": {"evaluator": "perplexity", "data": {"pth": "a.txt"}}}},
            r"tasks\.t\.data\.path: Field required",
        ),
        (
            {"tasks": {"t": {"evaluator": "function", "function": "m:f", "n_examples": 1}}},
            r"tasks\.t\.n_examples: .*greater than or equal to 2; found 1",
        ),
        ({"experts": {}}, r"experts: .*at least 1"),
        ({"search": {"n_trials": 1}}, "search.n_trials is 1, and as many trials go to references"),
        ({"search": {"seed": 2**32, "n_trials": 9}}, "search.seed"),
        ({"constraints": [{"tasks": [], "at_least": 1.0}]}, "at least 1 item"),
        ({"constraints": [{"tasks": ["t"], "against": "base", "at_least": math.nan}]}, "finite"),
        (
            {
                "space": {
                    "method": "ties",
                    "coefficient": {"scale": {"low": 0, "high": 1, "log": 1}},
                }
            },
            "log: a key that is not known here",
        ),
        (
            {
                "space": {
                    "method": "ties",
                    "coefficient": {"scale": {"low": 0, "high": 1}, "per": "group"},
                }
            },
            r"study\.yaml:\d+: space\.coefficient\.per: a key that is not known here",
        ),
        ({"space": "ties"}, r"space: a mapping of keys is needed; found 'ties'"),
        ({"space": ["ties"]}, r"space\.0: a mapping of keys is needed; found 'ties'"),
        ({"space": {"method": "tis"}}, "space: no merge method named 'tis'; did you mean 'ties'"),
        (
            {"space": [{"method": "ties"}, {"method": "dar"}]},
            r"space\.1: no merge method named 'dar'",
        ),
        ({"space": {"method": "ties"}}, "space: nothing is searched"),
        ({"space": {"method": "ties", "coefficient": 1.0}}, "space: nothing is searched"),
        (
            {"space": [{"method": "ties"}, {"method": "pcb", "groups": {"patterns": []}}]},
            r"space\.1: groups: found \{'patterns': \[\]\}; allowed: whole",
        ),
        (
            {"space": [{"method": "ties"}, {"method": "dare", "settings": {"variant": "nlp"}}]},
            "space 'dare': method 'dare' has no setting 'variant'",
        ),
        (
            {"space": {"method": "ties", "settings": {"aggregate": ["mean", "mean"]}}},
            r"space 'ties': settings\.aggregate: a value stands twice",
        ),
        (
            {"space": {"method": "ties", "coefficient": {"low": 0, "high": 1, "step": 5}}},
            "space 'ties': coefficient: step 5.0 is larger than the range",
        ),
        (
            {"space": {"method": "ties", "density": 0.2, "drop_ratio": 0.8}},
            "give density or drop_ratio",
        ),
        (
            {"space": {"method": "ties", "settings": {"depth_slope": {"low": 3, "high": 1}}}},
            r"settings\.depth_slope: range \[3\.0, 1\.0\] is empty",
        ),
        ({"space": {"method": "ties", "settings": {"aggregate": []}}}, "is an empty list"),
        ({"space": []}, "space: it is empty; give one method or more"),
        ({"space": [{"method": "ties"}, {"method": "ties"}]}, "give each a name: of its own"),
        ({"space": {"method": "ties", "groups": {"depth": 0}}}, "depth is 0; allowed is 1"),
        (
            {"space": {"method": "ties", "groups": {"patterns": ["mlp", "mlp"]}}},
            "a pattern is listed twice",
        ),
        (
            {"constraints": [{"tasks": ["tt"], "at_least": 0.98}]},
            r"constraints\.0\.tasks: no task 'tt'; tasks: t",
        ),
        (
            {"constraints": [{"tasks": "all", "at_least": 0.98}]},
            "task 't' names no expert: of its own",
        ),
        (
            {"constraints": [{"tasks": "all", "against": "me", "at_least": 1}]},
            r"constraints\.0\.against.*found 'me'",
        ),
        (
            {
                "search": {"sampler": "cma_es", "n_trials": 1},
                "space": {
                    "method": "ties",
                    "settings": {"aggregate": ["mean", "sum"]},
                    "coefficient": {"low": 0, "high": 1},
                },
            },
            "this space holds choices; use tpe",
        ),
    ],
)
def test_a_wrong_study_is_refused_by_file_and_key(tmp_path, changes, message):
    with pytest.raises(SpecError, match=message):
        read(tmp_path, **changes)


def test_a_key_given_twice_and_a_file_that_is_no_mapping_are_refused(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("base: a\nbase: b\n")
    with pytest.raises(SpecError, match=r"study\.yaml:2: key 'base' stands twice"):
        read_study(file)
    file.write_text("- base\n")
    with pytest.raises(SpecError, match="holds list; a mapping of keys is needed"):
        read_study(file)
    with pytest.raises(SpecError, match=r"nowhere\.yaml: cannot be read: No such file"):
        read_study(tmp_path / "nowhere.yaml")


def test_a_part_of_the_examples_may_be_a_fraction(tmp_path):
    task = {"split": "train", "select": 0.25, "hold_out": 0.1}
    study = read(tmp_path, tasks={"t": task})
    assert (study.tasks["t"].select, study.tasks["t"].hold_out) == (0.25, 0.1)
    with pytest.raises(SpecError, match=r"tasks\.t\.select"):
        read(tmp_path, tasks={"t": task | {"select": 1.5}})
    with pytest.raises(SpecError, match=r"tasks\.t\.select"):
        read(tmp_path, tasks={"t": task | {"select": 0}})
    with pytest.raises(SpecError, match=r"select: Input should be a valid integer; found 1\.0"):
        read(tmp_path, tasks={"t": task | {"select": 1.0}})  # all of them, or one of them


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_8bit": True}, "which a quantised one cannot take; scoring: int8"),
        ({"max_length": 2048}, r"model_args.max_length: not here: give lm_harness\.max_length"),
        ({"torchscript": True}, "model_args.torchscript: allowed are attn_implementation, add_b"),
        ({"add_bos_token": 1}, "model_args.add_bos_token: a bool is needed; found 1"),
    ],
)
def test_loading_arguments_that_make_no_sense_for_a_merged_model_are_refused(
    tmp_path, arguments, message
):
    with pytest.raises(SpecError, match=rf"study\.yaml:\d+: lm_harness: .*{message}"):
        read(tmp_path, lm_harness={"model_args": arguments})
    taken = {"attn_implementation": "eager", "add_bos_token": False}
    spec = read(tmp_path, lm_harness={"model_args": taken})
    assert spec.loading == {"attn_implementation": "eager"}


def test_whether_answers_are_kept_is_no_part_of_what_guards_a_resume(tmp_path):
    dropped = read(tmp_path)
    kept = read(tmp_path, {"tasks.t.answers": "keep"}, lm_harness={"answers": "keep"})
    assert dropped.canonical() == kept.canonical()


@pytest.mark.parametrize("objective", ["normalised", "worst", "tasks"])
def test_a_task_that_is_called_as_an_expert_is_normalised_by_it(tmp_path, objective):
    tasks = {name: {"split": "train"} for name in ("math", "law")}
    study = read(tmp_path, tasks=tasks, objective=objective)
    assert [task.expert for task in study.tasks.values()] == ["math", None]
    tasks["law"]["expert"] = "code"
    study = read(tmp_path, tasks=tasks, objective=objective)
    assert [task.expert for task in study.tasks.values()] == [None, "code"]


def test_nothing_is_normalised_by_no_expert(tmp_path):
    tasks = {name: {"split": "train"} for name in ("math", "law")}
    assert read(tmp_path, tasks=tasks, objective="mean").tasks["math"].expert is None
    message = (
        r"study\.yaml:\d+: objective: normalised .* no task names an expert: of its own, or is "
        r"called as one \(tasks: law; experts: math, code\); name one, or use objective: mean"
    )
    with pytest.raises(SpecError, match=message):
        read(tmp_path, tasks={"law": {"split": "train"}}, objective="normalised")
    file = tmp_path / "study.yaml"
    written = {key: value for key, value in STUDY.items() if key != "objective"}
    file.write_text(yaml.safe_dump(written))
    with pytest.raises(SpecError, match=r"study\.yaml:1: objective: normalised .*tasks: t;"):
        read_study(file)

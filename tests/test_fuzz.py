"""Whatever stands in a user's file: it is accepted, or refused in one line that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import yaml
from transformers import AutoModelForCausalLM

from searchmerge.config import read_config
from searchmerge.errors import SearchMergeError
from searchmerge.evaluators.tokenizer import load_tokenizer
from searchmerge.models import check_groups, open_models
from searchmerge.plan import Groups, MergePlan
from searchmerge.study import read_study
from tests.fuzzing import json_dump, mutations
from tests.tiny import make_models, make_study

N_MUTATIONS = 50
CONFIG = {
    "executor": "ray",
    "ray": {"workers": 2, "gpus_per_worker": 0.5, "deadline": "30m", "address": "auto"},
    "device": "cpu",
    "threads": 2,
    "engine": "eager",
    "storage": "journal:study.journal",
}
PLAN = MergePlan(
    "ties",
    ("first", "second"),
    {"coefficient": ((0.5, 0.5), (1.0, 0.2)), "density": ((0.2, 0.3), (0.2, 0.3))},
    Groups(depth=2),
    {"aggregate": "mean"},
)
SPACES = [
    {
        "method": "ties",
        "coefficient": {"low": 0.0, "high": 2.0},
        "settings": {"aggregate": ["mean", "sum"]},
    },
    {
        "method": "dare",
        "groups": {"depth": 2},
        "density": {"first": 0.5, "second": 0.4},
        "coefficient": {"scale": {"low": 0, "high": 1}},
    },
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    make_models(root)
    model = AutoModelForCausalLM.from_pretrained(root / "second")
    model.save_pretrained(root / "sharded", max_shard_size="5KB")
    for file in (root / "second").glob("tokenizer*"):
        shutil.copy(file, root / "sharded")
    lora = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 3},
        alpha_pattern={"v_proj": 5},
    )
    peft.get_peft_model(model, lora).save_pretrained(root / "adapter")
    PLAN.to_yaml(root / "plan.yaml")
    (root / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    constraints = [{"tasks": "all", "against": "base", "at_least": 0.5}]
    search = {"n_trials": 9, "timeout": "30m", "racing": {"min_blocks": 3}, "block_size": 4}
    make_study(root, space=SPACES, constraints=constraints, search=search)
    shutil.copy(root / "study.yaml", root / "whole.yaml")
    make_study(root, experts={"first": "adapter", "second": "sharded"})
    return root


def check_models(root: Path) -> None:
    study = read_study(root / "study.yaml")
    check_groups(study, open_models(study))


class Case(NamedTuple):
    file: str
    load: Callable[[bytes], Any]
    dump: Callable[[Any], str]
    use: Callable[[Path], Any]


def yaml_dump(data):
    return yaml.safe_dump(data, allow_unicode=True, sort_keys=False)


def nothing(_):
    return {}


CASES = [
    Case("whole.yaml", yaml.safe_load, yaml_dump, lambda root: read_study(root / "whole.yaml")),
    Case("plan.yaml", yaml.safe_load, yaml_dump, lambda r: MergePlan.from_yaml(r / "plan.yaml")),
    Case("config.yaml", yaml.safe_load, yaml_dump, lambda r: read_config(r / "config.yaml")),
    Case("base/config.json", json.loads, json_dump, check_models),
    Case("sharded/config.json", json.loads, json_dump, check_models),
    Case("sharded/model.safetensors.index.json", json.loads, json_dump, check_models),
    Case("sharded/model-00001-of-00005.safetensors", nothing, json_dump, check_models),
    Case("sharded/tokenizer.json", json.loads, json_dump, check_models),
    Case("adapter/adapter_config.json", json.loads, json_dump, check_models),
    Case("adapter/adapter_model.safetensors", nothing, json_dump, check_models),
    Case("base/tokenizer.json", json.loads, json_dump, lambda r: load_tokenizer(r / "base")),
    Case(
        "base/tokenizer_config.json", json.loads, json_dump, lambda r: load_tokenizer(r / "base")
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_a_mutated_file_is_accepted_or_refused_in_one_line(root, case, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(root / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = root / case.file
    content = file.read_bytes()
    case.use(root)
    n_refused = 0
    try:
        for mutated in mutations(content, case.load(content), case.dump, case.file, N_MUTATIONS):
            file.write_bytes(mutated)
            try:
                case.use(root)
            except SearchMergeError as error:
                n_refused += 1
                message = str(error)
                assert "\n" not in message
                assert file.name in message or f"{file.parent}" in message, mutated
            except Exception as error:
                raise AssertionError(f"{type(error).__name__} of {mutated!r}") from error
    finally:
        file.write_bytes(content)
    assert n_refused > N_MUTATIONS // 5


def test_mutations_are_the_same_each_time():
    content = json.dumps({"a": [1, {"b": "c"}]}).encode()
    draws = [
        list(mutations(content, json.loads(content), json_dump, "seed", 40)) for _ in range(2)
    ]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 25

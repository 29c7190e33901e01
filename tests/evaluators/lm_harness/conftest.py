"""A folder of lm-eval tasks, and a model to score."""

import json

import pytest
import yaml

from tests.evaluators.lm_harness.tasks import (
    TASKS,
    documents,
)
from tests.evaluators.models import tiny_model

ACC = {"metric": "acc", "aggregation": "mean"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tasks whose data files are named relative to it."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data").mkdir()
    for split, n in (("train", 6), ("validation", 10), ("test", 7)):
        lines = [json.dumps(doc | {"answer": i % 4}) for i, doc in enumerate(documents(split, n))]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    files = {split: f"data/{split}.jsonl" for split in ("train", "validation", "test")}
    for name, task in TASKS.items():
        settings = {"dataset_kwargs": {"data_files": files}, "metadata": {"version": 1.0}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | task | settings))
    group = {"group": "both", "task": ["mc", "texts"], "metadata": {"version": 1.0}}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def groups(folder, tmp_path_factory):
    """Groups of a 7-example and a 10-example task, in several shapes."""
    root = tmp_path_factory.mktemp("groups")
    config = yaml.safe_load((folder / "mc.yaml").read_text())
    config["dataset_kwargs"]["data_files"] = {
        split: str(folder / name) for split, name in config["dataset_kwargs"]["data_files"].items()
    }
    files = {
        "small": config | {"task": "small", "tag": ["pair"]},
        "large": config
        | {
            "task": "large",
            "tag": ["pair"],
            "dataset_kwargs": {
                "data_files": {
                    "test": str(folder / "data" / "validation.jsonl"),
                    "validation": str(folder / "data" / "test.jsonl"),
                    "train": str(folder / "data" / "train.jsonl"),
                }
            },
        },
        "by_size": {
            "group": "by_size",
            "task": ["small", "large"],
            "aggregate_metric_list": [ACC | {"weight_by_size": True}],
        },
        "alike": {
            "group": "alike",
            "task": ["small", {"task": "large", "num_fewshot": 1, "fewshot_split": "train"}],
            "aggregate_metric_list": [ACC | {"weight_by_size": False}],
        },
        "nested": {"group": "nested", "task": ["by_size", {"group": "inner", "task": ["small"]}]},
        "broken": {"group": "broken", "task": ["small", "largee"]},
    }
    for name, content in files.items():
        text = yaml.safe_dump(content | {"metadata": {"version": 1.0}})
        (root / f"{name}.yaml").write_text(text)
    return root

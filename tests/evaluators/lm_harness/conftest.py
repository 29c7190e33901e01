"""A folder of lm-eval tasks, and a model to score."""

import json

import pytest
import yaml

from tests.evaluators.lm_harness.tasks import (
    TASKS,
    documents,
)
from tests.evaluators.models import tiny_model


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

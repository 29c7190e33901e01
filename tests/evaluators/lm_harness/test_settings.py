import json

import pytest
import yaml

from searchmerge.evaluators.lm_harness.evaluator import LmHarness
from searchmerge.evaluators.lm_harness.keys import LmHarnessSection, LmTask
from searchmerge.evaluators.lm_harness.language_model import TransformersBackend
from tests.evaluators.models import tiny_model, tiny_tokenizer

TASK = {
    "task": "own",
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["yes", "no"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def write(folder, n_lines):
    folder.mkdir(parents=True)
    lines = [json.dumps({"question": f"is it {i}?", "answer": i % 2}) for i in range(n_lines)]
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("where", ["beside the YAML", "in a dataset's own folder"])
def test_data_files_are_relative_to_what_they_belong_to(tmp_path, monkeypatch, where):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "tasks", 3)
    write(tmp_path / "dataset", 5)
    beside = where == "beside the YAML"
    task = TASK | {
        "dataset_path": "json" if beside else str(tmp_path / "dataset"),
        "dataset_kwargs": {"data_files": {"validation": "examples.jsonl"}},
    }
    (tmp_path / "tasks" / "own.yaml").write_text(yaml.safe_dump(task))
    harness = LmHarness(
        {"own": LmTask("own", "validation")},
        tokenizer=tiny_tokenizer(),
        backend=TransformersBackend(1024),
        section=LmHarnessSection(include_path=("tasks",)),
        folder=tmp_path,
    )
    assert harness.tasks["own"].n_examples == (3 if beside else 5)


def test_an_empty_prompt_is_the_token_that_begins_a_text(tmp_path):
    write(tmp_path / "tasks", 2)
    task = TASK | {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": "examples.jsonl"}},
        "output_type": "generate_until",
        "doc_to_text": "",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
        ],
    }
    del task["doc_to_choice"]
    (tmp_path / "tasks" / "own.yaml").write_text(yaml.safe_dump(task))
    harness = LmHarness(
        {"own": LmTask("own", "validation")},
        tokenizer=tiny_tokenizer(),
        backend=TransformersBackend(1024),
        section=LmHarnessSection(include_path=("tasks",)),
        folder=tmp_path,
    )
    assert harness.score(tiny_model("llama"), "own", [0, 1]) == (0.0, 0.0)

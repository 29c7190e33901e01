import json
from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import TaskManager

from searchmerge.evaluators.lm_harness.backend import TransformersBackend
from searchmerge.evaluators.lm_harness.evaluator import LmHarness
from searchmerge.evaluators.lm_harness.keys import LmHarnessSection, LmTask
from searchmerge.evaluators.lm_harness.settings import may_show_itself
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


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"validation_split": "a", "fewshot_split": "a"}, True),
        ({"validation_split": "a", "fewshot_config": {"split": "a"}}, True),
        ({"test_split": "a"}, True),
        ({"validation_split": "a"}, False),
        ({"test_split": "a", "fewshot_split": "a"}, False),
        ({"test_split": "a", "training_split": "b"}, False),
        ({"test_split": "a", "fewshot_split": "b"}, False),
    ],
)
def test_lm_eval_shows_an_example_in_its_own_prompt_unless_the_split_is_its_test_split(
    tmp_path, config, shown
):
    write(tmp_path / "data", 6)
    file = str(tmp_path / "data" / "examples.jsonl")
    other = str(tmp_path / "other.jsonl")
    Path(other).write_text("".join(f'{{"question": "no {i}?", "answer": 0}}\n' for i in range(6)))
    task = TASK | {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"a": file, "b": other}},
        "validation_split": None,
        "num_fewshot": 5,
    }
    assert may_show_itself(task | config, "a") == shown
    loaded = TaskManager(include_defaults=False).load([task | config])["tasks"]["own"]
    loaded.set_fewshot_seed(1)
    prompts = [loaded.fewshot_context(doc, num_fewshot=5) for doc in loaded.eval_docs]
    repeated = [
        prompt.count(doc["question"]) == 2
        for prompt, doc in zip(prompts, loaded.eval_docs, strict=True)
    ]
    assert any(repeated) == shown

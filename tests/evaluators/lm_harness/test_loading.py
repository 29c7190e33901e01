"""Tasks are loaded for the split that a study names, and what they lack is said."""

import pytest
import yaml

from searchmerge.errors import SpecError
from searchmerge.evaluators.lm_harness.keys import LmTask
from searchmerge.evaluators.score_kind import Mean
from tests.evaluators.lm_harness.tasks import TASKS, harness


@pytest.mark.parametrize(("split", "n"), [("validation", 10), ("test", 7), ("train", 6)])
def test_the_split_that_the_study_names_is_scored(folder, model, split, n):
    evaluator = harness(folder, LmTask("mc", split))
    info = evaluator.tasks["mine"]
    assert (info.n_examples, info.metric, info.kind) == (n, "acc", Mean())
    assert len(evaluator.score(model, "mine", range(n))) == n
    assert f"of {split} " in evaluator.prompts("mine", 0)[0]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_example_is_never_shown_with_its_answer(folder, split):
    task = "shown" if split == "validation" else "mc"
    evaluator = harness(folder, LmTask(task, split, num_fewshot=5))
    for i in range(evaluator.tasks["mine"].n_examples):
        assert evaluator.prompts("mine", i)[0].count(f"of {split} {i}?") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "none.jsonl"),
        ({"doc_to_text": "{{questoin}}"}, "questoin"),
        ({"output_type": "essay"}, "essay"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_named(folder, tmp_path, change, message):
    config = yaml.safe_load((folder / "mc.yaml").read_text())
    files = {"test": str(folder / "data" / "test.jsonl")}
    config |= {
        "test_split": "test",
        "validation_split": None,
        "dataset_kwargs": {"data_files": files},
    } | change
    (tmp_path / "mc.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SpecError, match=rf"tasks\.mine: .*'mc'.*{message}"):
        harness(tmp_path, LmTask("mc", "test"))


def test_code_of_a_model_runs_only_where_a_study_allows_it(folder, tmp_path):
    config = yaml.safe_load((folder / "mc.yaml").read_text()) | {"unsafe_code": True}
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {k: str(folder / v) for k, v in files.items()}
    (tmp_path / "mc.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SpecError, match=r"allow it with lm_harness\.confirm_run_unsafe_code"):
        harness(tmp_path, LmTask("mc", "test"))
    allowed = harness(tmp_path, LmTask("mc", "test"), confirm_run_unsafe_code=True)
    assert allowed.tasks["mine"].n_examples == 7


def test_metadata_reach_the_tasks_that_ask_for_it(folder, tmp_path):
    (tmp_path / "made.py").write_text(
        "import datasets\n"
        "def load(lengths=(), **_):\n"
        "    rows = [{'question': f'q{n}', 'choices': ['a', 'b'], 'answer': 0} for n in lengths]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
    )
    kept = ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target", "metric_list")
    config = {"task": "mc", "test_split": "test", **{key: TASKS["mc"][key] for key in kept}}
    (tmp_path / "mc.yaml").write_text(
        yaml.safe_dump(config) + "custom_dataset: !function made.load\n"
    )
    evaluator = harness(tmp_path, LmTask("mc", "test"), metadata={"lengths": [1, 2, 3]})
    assert evaluator.tasks["mine"].n_examples == 3


def test_a_split_without_examples_is_named(folder, tmp_path):
    config = yaml.safe_load((folder / "mc.yaml").read_text()) | {"task": "empty"}
    config["dataset_kwargs"] = {"data_files": {"test": "empty.jsonl", "validation": "empty.jsonl"}}
    (tmp_path / "empty.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SpecError, match=r"tasks\.mine: lm-eval could not load its task 'empty'"):
        harness(tmp_path, LmTask("empty", "test"))

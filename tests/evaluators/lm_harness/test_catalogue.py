"""Tasks are found by name, and loaded for the split that a study names."""

import pytest
import yaml

from searchmerge.errors import SpecError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.evaluators.lm_harness.catalogue import LmTask
from searchmerge.evaluators.lm_harness.evaluator import LmHarness, LmHarnessSection
from searchmerge.evaluators.lm_harness.language_model import TransformersBackend
from tests.evaluators.lm_harness.tasks import TASKS, harness
from tests.evaluators.models import tiny_tokenizer


@pytest.mark.parametrize(("split", "n"), [("validation", 10), ("test", 7), ("train", 6)])
def test_the_split_that_the_study_names_is_scored(folder, model, split, n):
    evaluator = harness(folder, LmTask("mc", split))
    assert evaluator.tasks == {"mine": TaskInfo(n, mean=True, metric="acc")}
    assert len(evaluator.score(model, "mine", range(n))) == n
    assert f"of {split} " in evaluator.prompts("mine", 0)[0]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_example_is_never_shown_with_its_answer(folder, split):
    task = "shown" if split == "validation" else "mc"
    evaluator = harness(folder, LmTask(task, split, num_fewshot=5))
    for i in range(evaluator.tasks["mine"].n_examples):
        assert evaluator.prompts("mine", i)[0].count(f"of {split} {i}?") == 1


def test_data_files_are_found_from_any_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert harness(folder, LmTask("mc", "test")).tasks["mine"].n_examples == 7


def test_includes_and_functions_work_across_folders(folder, model, tmp_path):
    (tmp_path / "helpers.py").write_text(
        "def always(doc, results):\n    return {'acc': 0.25}\n", encoding="utf-8"
    )
    (tmp_path / "mine.yaml").write_text(
        f"include: {folder}/mc.yaml\ntask: included\nprocess_results: !function helpers.always\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    evaluator = harness(tmp_path, LmTask("included", "test"))
    assert evaluator.score(model, "mine", [0, 1]) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (LmTask("mc", "dev"), r"tasks\.mine\.split.*'dev' \(it has: test, train, validation\)"),
        (LmTask("mc", "test", metric="bleu"), r"tasks\.mine\.metric.*'bleu'.*acc, acc_norm, mcc"),
        (LmTask("mc", "test", filter="best"), r"tasks\.mine\.filter.*'best'.*it has: none"),
        (LmTask("both", "test"), r"'both' is a group of lm-eval tasks.*mc, texts"),
    ],
)
def test_what_a_task_lacks_is_refused(folder, task, message):
    with pytest.raises(SpecError, match=message):
        harness(folder, task)


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_suggestions(folder):
    with pytest.raises(SpecError, match=r"no task named 'hellaswagg'.*did you mean 'hellaswag'"):
        harness(folder, LmTask("hellaswagg", "test"))


@pytest.mark.slow
def test_a_group_that_lm_eval_brings_is_refused():
    with pytest.raises(SpecError, match=r"'mmlu' is a group of lm-eval tasks.*mmlu_stem"):
        harness(None, LmTask("mmlu", "test"))


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


def test_a_later_folder_of_tasks_comes_before_an_earlier(folder, tmp_path, model):
    config = yaml.safe_load((folder / "mc.yaml").read_text())
    longer = str(folder / "data" / "validation.jsonl")
    config["dataset_kwargs"]["data_files"] = {
        "test": longer,
        "validation": longer,
        "train": longer,
    }
    (tmp_path / "mc.yaml").write_text(yaml.safe_dump(config))
    evaluator = LmHarness(
        {"mc": LmTask(split="test"), "texts": LmTask(split="test")},
        tokenizer=tiny_tokenizer(),
        backend=TransformersBackend(1024),
        section=LmHarnessSection(include_path=(str(folder), str(tmp_path))),
        folder=tmp_path,
    )
    assert {name: info.n_examples for name, info in evaluator.tasks.items()} == {
        "mc": 10,
        "texts": 7,
    }


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

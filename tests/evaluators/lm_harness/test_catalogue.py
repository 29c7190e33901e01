"""Tasks are found by name, the user's own before lm-eval's."""

import pytest
import yaml

from searchmerge.errors import SpecError
from searchmerge.evaluators.lm_harness.backend import TransformersBackend
from searchmerge.evaluators.lm_harness.catalogue import Catalogue
from searchmerge.evaluators.lm_harness.evaluator import LmHarness
from searchmerge.evaluators.lm_harness.keys import LmHarnessSection, LmTask
from tests.evaluators.lm_harness.tasks import harness
from tests.evaluators.models import tiny_tokenizer


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
        (
            LmTask("mc", "test", metric=("bleu",)),
            r"tasks\.mine\.metric.*'bleu'.*acc, acc_norm",
        ),
        (LmTask("mc", "test", filter="best"), r"tasks\.mine\.filter.*'best'.*it has: none"),
        (LmTask("mc", "test", metric=("acc", "mcc")), "'mcc' of 'mc' is no mean over examples"),
        (LmTask("both", "test"), "'bits_per_byte' of 'texts' is no mean over examples"),
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
def test_a_group_that_lm_eval_brings_is_found_with_all_its_members():
    members = Catalogue([]).find("mmlu", "tasks.mine.task").leaves()
    assert len(members) == 57
    assert {"mmlu", "mmlu_stem"} <= set(members[0].path) | set(members[-1].path)


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

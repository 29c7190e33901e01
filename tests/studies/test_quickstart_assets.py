"""What the quickstart study ships: its task files, its training rows and its adapters."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

QUICKSTART = Path(__file__).parents[2] / "studies" / "quickstart"
TASKS = ("definition", "hypernym", "rhyme", "sentiment", "spelling", "supersense")
N_CHOICES = {"sentiment": 2}  # of the others 4
MODULES_A_LAYER = 7  # q, k, v and o projections; gate, up and down projections
N_LAYERS = 30

each_task = pytest.mark.parametrize("task", TASKS)


def held_out_rows(task: str) -> list[dict[str, Any]]:
    path = QUICKSTART / "tasks" / "data" / f"{task}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_rows(task: str) -> list[dict[str, Any]]:
    with gzip.open(QUICKSTART / "train" / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def adapter_tensors(task: str) -> dict[str, torch.Tensor]:
    path = QUICKSTART / "experts" / task / "adapter_model.safetensors"
    with safe_open(path, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def test_every_task_has_its_data_its_training_rows_and_its_expert() -> None:
    assert {path.stem for path in (QUICKSTART / "tasks").glob("*.yaml")} == set(TASKS)
    assert {path.stem for path in (QUICKSTART / "tasks/data").iterdir()} == set(TASKS)
    assert {path.name for path in (QUICKSTART / "train").iterdir()} == {
        f"{task}.jsonl.gz" for task in TASKS
    }
    assert {path.name for path in (QUICKSTART / "experts").iterdir()} == set(TASKS)


@each_task
def test_a_task_names_files_that_are_there_beside_it(task: str) -> None:
    path = QUICKSTART / "tasks" / f"{task}.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert settings["task"] == f"quickstart_{task}"
    assert settings["output_type"] == "multiple_choice"
    assert settings["num_fewshot"] == 0
    files = settings["dataset_kwargs"]["data_files"]
    assert settings["validation_split"] in files
    for file in files.values():
        assert not Path(file).is_absolute()
        assert (path.parent / file).is_file()


@each_task
@pytest.mark.parametrize("rows_of", [held_out_rows, training_rows])
def test_every_row_has_a_question_choices_and_an_answer_among_them(task: str, rows_of) -> None:
    for row in rows_of(task):
        assert set(row) == {"question", "choices", "answer"}
        assert row["question"] == row["question"].strip() != ""
        assert all(choice == choice.strip() != "" for choice in row["choices"])
        assert len(set(row["choices"])) == len(row["choices"]) == N_CHOICES.get(task, 4)
        assert row["answer"] in range(4)


@each_task
def test_there_are_enough_held_out_questions_and_each_comes_once(task: str) -> None:
    questions = [row["question"] for row in held_out_rows(task)]
    assert len(set(questions)) == len(questions) >= 300


def test_no_expert_was_trained_on_a_held_out_question() -> None:
    trained = {row["question"] for task in TASKS for row in training_rows(task)}
    held_out = {row["question"] for task in TASKS for row in held_out_rows(task)}
    assert not trained & held_out


@each_task
def test_an_adapter_is_small_and_bfloat16_and_has_both_factors_of_every_module(task: str) -> None:
    tensors = adapter_tensors(task)
    path = QUICKSTART / "experts" / task / "adapter_model.safetensors"
    assert path.stat().st_size < 6_000_000
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    modules = {name.rsplit(".lora_", 1)[0] for name in tensors}
    assert len(modules) == N_LAYERS * MODULES_A_LAYER
    assert set(tensors) == {f"{m}.lora_{factor}.weight" for m in modules for factor in "AB"}


@each_task
def test_every_factor_of_an_adapter_is_finite_and_was_trained(task: str) -> None:
    for name, tensor in adapter_tensors(task).items():
        assert tensor.isfinite().all(), name
        assert tensor.any(), name  # B starts at zero


@each_task
def test_an_adapter_names_its_base_without_a_path(task: str) -> None:
    config = json.loads((QUICKSTART / "experts" / task / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    rank = config["r"]
    factors = adapter_tensors(task)
    assert all(rank in (t.shape[0], t.shape[1]) for t in factors.values())

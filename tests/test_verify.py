"""The report of a study held against lm-eval's own harness on the saved model."""

import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from searchmerge.cli import app
from searchmerge.config import RunConfig
from searchmerge.errors import StudyError
from searchmerge.report.results import Results
from searchmerge.search.references import reference_plans
from searchmerge.study import kept_study, read_study
from searchmerge.verify import Comparison, Verification
from tests.studies_of_tasks import CHAT, run
from tests.tiny import EXPERTS, make_models

TASKS = ("pair", "drawn", "said", "apart")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study of a group with a chat template, and of tasks of every sort."""
    return finish(tmp_path_factory.mktemp("verified"), "llama")


def finish(root, kind, **changes):
    """Run such a study on models of a kind."""
    make_models(root, kind=kind)
    for name in ("base", *EXPERTS):
        (root / name / "chat_template.jinja").write_text(CHAT)
    parts = {"split": "validation", "select": 8, "hold_out": 8}
    return run(
        root,
        **changes,
        name="verified",
        lm_harness={
            "include_path": "tasks",
            "model_args": {"attn_implementation": "eager", "add_bos_token": True},
        },
        tasks={
            "pair": {**parts, "chat_template": True, "system_instruction": "w1 w2"},
            "drawn": {**parts, "samples": list(range(40, 16, -1))},
            "said": {**parts, "filter": "word"},
            "apart": {
                **parts,
                "task": "drawn",
                "split": {"select": "train", "hold_out": "validation"},
            },
        },
    )


def copied(finished, tmp_path):
    """Return a copy of a finished run."""
    shutil.copytree(finished, tmp_path / "copied")
    return tmp_path / "copied"


def test_report_results_and_card_name_the_split_of_each_part(finished):
    assert Results.load(finished).drawn_from == {
        "apart": {"select": "split 'train'", "hold_out": "split 'validation'"}
    }
    for written in ("report.md", "model/README.md"):
        assert "| apart | split 'train' | split 'validation' |" in (finished / written).read_text()


def test_the_saved_model_scores_in_lm_eval_what_the_report_says(finished):
    verification = Verification(finished, RunConfig())
    compared = list(verification.compare())
    assert [(c.task, c.part, c.n_examples) for c in compared] == [
        (task, part, 8) for task in TASKS for part in ("select", "hold_out")
    ]
    assert [c.theirs for c in compared] == pytest.approx([c.ours for c in compared], abs=1e-9)
    assert {c.task for c in compared if 0 < c.ours < 1} == set(TASKS)
    assert [*verification.told(compared)] == [
        "The saved model scores in lm-eval what the report says."
    ]


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("olmo2", marks=pytest.mark.slow)])
def test_models_of_other_families_score_in_lm_eval_what_the_report_says(kind, tmp_path):
    compared = list(Verification(finish(tmp_path, kind), RunConfig()).compare())
    assert {(c.task, c.part) for c in compared} == {
        (task, part) for task in TASKS for part in ("select", "hold_out")
    }
    assert [c.theirs for c in compared] == pytest.approx([c.ours for c in compared], abs=1e-9)
    assert any(0 < c.ours < 1 for c in compared)


@pytest.mark.parametrize("kind", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_encoder_decoders_score_in_lm_eval_what_the_report_says(kind, tmp_path):
    run_dir = finish(tmp_path, kind, model_class="AutoModelForSeq2SeqLM")
    compared = list(Verification(run_dir, RunConfig()).compare())
    assert {c.task for c in compared} == set(TASKS)
    assert [c.theirs for c in compared] == pytest.approx([c.ours for c in compared], abs=1e-9)
    assert any(0 < c.ours < 1 for c in compared)
    assert AutoModelForSeq2SeqLM.from_pretrained(run_dir / "model").config.model_type == kind


def test_the_command_prints_a_table_and_what_comes_of_it(finished):
    result = CliRunner().invoke(app, ["verify", str(finished), "--limit", "2"])
    assert result.exit_code == 0
    assert "The saved model scores in lm-eval what the report says." in result.output
    assert "+0.000000" in result.output


def test_some_of_the_held_out_examples_are_compared_with_what_they_scored(finished):
    verification = Verification(finished, RunConfig())
    compared = list(verification.compare(limit=3))
    assert [(c.part, c.n_examples) for c in compared] == [("hold_out", 3)] * 4
    assert [c.theirs for c in compared] == pytest.approx([c.ours for c in compared], abs=1e-9)


def test_a_saved_model_that_was_altered_is_told(finished, tmp_path):
    run_dir = copied(finished, tmp_path)
    file = run_dir / "model" / "model.safetensors"
    weights = {name: -weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert CliRunner().invoke(app, ["verify", str(run_dir)]).exit_code == 1
    verification = Verification(run_dir, RunConfig())
    compared = list(verification.compare())
    wrong = [c for c in compared if c.is_wrong]
    assert wrong
    lines = list(verification.told(compared))
    assert len(lines) == len(wrong)
    first = wrong[0]
    assert lines[0] == (
        f"{first.task}, {first.part}: lm-eval's score of the saved model differs from the "
        f"report's by {first.difference:+.6f}, {first.beyond:.6f} beyond rounding"
    )


def test_an_example_that_lm_eval_shows_in_its_own_prompt_is_no_failure(tmp_path):
    make_models(tmp_path)
    parts = {"split": "validation", "select": 20, "hold_out": 28, "num_fewshot": 3}
    run_dir = run(tmp_path, name="shown", tasks={"shown": parts})
    verification = Verification(run_dir, RunConfig())
    compared = list(verification.compare())
    assert all("'shown' in its own few-shot prompt" in c.notes[0] for c in compared)
    assert not any(c.is_wrong for c in compared)
    assert any(c.beyond for c in compared)
    assert "as it may: lm-eval may show an example" in next(verification.told(compared))


def test_what_cannot_be_verified_is_refused(finished, tmp_path):
    with pytest.raises(StudyError, match="no results yet"):
        Verification(tmp_path, RunConfig())
    run_dir = copied(finished, tmp_path)
    plan = run_dir / "model" / "merge_plan.yaml"
    plan.write_text(plan.read_text() + "\n# as it was\n")
    Verification(run_dir, RunConfig())
    reference_plans(EXPERTS)["DARE"].to_yaml(plan)
    winner = Results.load(run_dir).winner
    message = rf"model: is not the model of {winner}, .* the same `searchmerge run` saves it"
    with pytest.raises(StudyError, match=message):
        Verification(run_dir, RunConfig())
    shutil.rmtree(run_dir / "model")
    with pytest.raises(StudyError, match="has not saved its model"):
        Verification(run_dir, RunConfig())
    (run_dir / "study.json").unlink()
    with pytest.raises(StudyError, match=r"what was run is not kept here \(study.json\)"):
        Verification(run_dir, RunConfig())


def test_a_comparison_says_what_is_beyond_rounding():
    def compared(theirs, ours=0.5, notes=()):
        return Comparison("task", "select", 8, ours, theirs, 0.01, notes)

    assert compared(0.505).beyond == 0
    assert compared(0.55).beyond == pytest.approx(0.04)
    assert compared(0.55).is_wrong
    assert not compared(0.55, notes=("sampled",)).is_wrong
    assert compared(-101.0, ours=-100.0).beyond == 0


def test_a_study_is_kept_as_it_was_read(finished):
    study = kept_study(finished)
    again = read_study(study.file)
    assert study.spec == again.spec
    assert study.name == "verified"
    assert study.folder == finished.parent.parent

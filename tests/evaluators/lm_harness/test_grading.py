"""Answers are graded by how clearly they were given."""

import math

import pytest
import yaml
from lm_eval.models.huggingface import HFLM

from searchmerge.evaluators.causal.scoring import CausalScorer
from searchmerge.evaluators.lm_harness.grading import log_odds
from searchmerge.evaluators.lm_harness.keys import LmTask
from tests.evaluators.lm_harness.tasks import harness, instances, lm_eval_samples
from tests.evaluators.models import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("task", "metric"), [("mc", "acc"), ("mc", "acc_norm"), ("fewshot", "acc")]
)
def test_grades_are_the_right_choices_lead_over_the_others(folder, model, task, metric):
    samples, _ = lm_eval_samples(folder, HFLM(model, tokenizer=tiny_tokenizer()), task)
    expected = []
    for sample in samples:
        choices = sample["doc"]["choices"]
        lengths = [len(choice) if metric == "acc_norm" else 1 for choice in choices]
        values = [r[0][0] / n for r, n in zip(sample["resps"], lengths, strict=True)]
        right = values.pop(sample["target"] if isinstance(sample["target"], int) else 0)
        expected.append(right - max(values))
    evaluator = harness(folder, LmTask(task, "test", metric=(metric,)))
    scores = evaluator.score(model, "mine", range(7))
    grades = evaluator.grades("mine", range(7))
    assert sum(grade != 0 for grade in grades) > 3  # it is 0 where the right choice stands twice
    assert all((g > 0) == bool(s) for g, s in zip(grades, scores, strict=True) if g)
    assert grades == pytest.approx(expected, abs=1e-4)


def test_grades_of_generation_are_the_log_odds_of_the_target(folder, model):
    lm = HFLM(model, tokenizer=tiny_tokenizer())
    samples, _ = lm_eval_samples(folder, lm, "generate")
    asked = [
        (sample["arguments"][0][0], f" {sample['target']}")
        for sample in samples
        if sample["filter"] == "first"
    ]
    given = lm.loglikelihood(instances("loglikelihood", asked))
    expected = [x - math.log1p(-math.exp(x)) for x, _ in given]
    evaluator = harness(folder, LmTask("generate", "test", metric=("exact_match",)))
    evaluator.score(model, "mine", range(7))
    assert evaluator.grades("mine", [2, 0]) == pytest.approx([expected[2], expected[0]], abs=1e-3)
    assert evaluator.grades("mine", range(7)) == pytest.approx(expected, abs=1e-3)
    evaluator.score(tiny_model("gpt2"), "mine", range(3))  # the next plan's
    later = evaluator.grades("mine", range(3))
    assert all(abs(one - other) > 1e-3 for one, other in zip(later, expected, strict=False))


def test_a_target_that_is_one_of_many_ways_to_be_right_gives_no_grade(folder, model, monkeypatch):
    monkeypatch.setattr("searchmerge.evaluators.lm_harness.grading._MOST_TOKENS", 0)
    evaluator = harness(folder, LmTask("generate", "test", metric=("exact_match",)))
    evaluator.score(model, "mine", range(7))
    assert evaluator.grades("mine", range(7)) == ()


def test_answers_whose_score_is_no_mean_are_not_graded(folder, model, tmp_path):
    config = yaml.safe_load((folder / "generate.yaml").read_text())
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {s: str(folder / f) for s, f in files.items()}
    config["metric_list"] = [config["metric_list"][0] | {"aggregation": "median"}]
    (tmp_path / "generate.yaml").write_text(yaml.safe_dump(config))
    evaluator = harness(tmp_path, LmTask("generate", "test"))
    assert len(evaluator.score(model, "mine", range(7))) == 1
    assert evaluator.grades("mine", range(7)) == ()


def test_a_study_that_goes_by_the_metric_alone_asks_for_no_grades(folder, model):
    for task in ("generate", "mc"):
        evaluator = harness(folder, LmTask(task, "test"), is_graded=False)
        evaluator.score(model, "mine", range(7))
        assert evaluator.grades("mine", range(7)) == ()


def test_what_is_scored_by_no_likeliest_choice_has_no_grades(folder, model):
    evaluator = harness(folder, LmTask("mc", "test", metric=("mcc",)))
    evaluator.score(model, "mine", range(7))
    assert evaluator.grades("mine", range(7)) == ()


@pytest.mark.parametrize(("p", "odds"), [(0.5, 1.0), (0.8, 4.0), (1e-30, 1e-30)])
def test_log_odds_are_those_of_a_probability(p, odds):
    assert log_odds(math.log(p)) == pytest.approx(math.log(odds))


def test_log_odds_of_what_is_certain_are_finite():
    assert 13 < log_odds(0.0) < 15
    assert math.isfinite(log_odds(-1e4))


@pytest.mark.parametrize(
    ("asked", "keys"),
    [
        ({"doc_to_target": "{{'a b c d ' * 7}}"}, {"max_length": 24}),
        (
            {"doc_to_text": "x th", "doc_to_target": "e", "target_delimiter": ""},
            {},
        ),  # "the" is one token, which begins in the prompt
        ({"doc_to_target": "answer", "doc_to_choice": ["a"]}, {}),  # of which there is no second
    ],
)
def test_a_target_that_cannot_follow_the_prompt_ends_no_study(
    folder, model, tmp_path, asked, keys
):
    config = yaml.safe_load((folder / "generate.yaml").read_text()) | asked
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {s: str(folder / f) for s, f in files.items()}
    (tmp_path / "scoring.py").write_text("def right(doc, results):\n    return {'exact_match': 1}")
    of_its = "process_results: !function scoring.right\n"
    (tmp_path / "generate.yaml").write_text(yaml.safe_dump(config) + of_its)
    evaluator = harness(tmp_path, LmTask("generate", "test"), **keys)
    evaluator.score(model, "mine", range(7))
    assert evaluator.grades("mine", range(7)) == ()


def test_no_pass_is_run_for_targets_where_one_of_a_task_has_none(folder, model, monkeypatch):
    samples, _ = lm_eval_samples(folder, HFLM(model, tokenizer=tiny_tokenizer()), "generate")
    lengths = [len(tiny_tokenizer().encode(f" {sample['target']}")) for sample in samples]
    assert min(lengths) < max(lengths)
    grading = "searchmerge.evaluators.lm_harness.grading._MOST_TOKENS"
    monkeypatch.setattr(grading, max(lengths) - 1)
    asked = []
    monkeypatch.setattr(CausalScorer, "score", lambda *arguments: asked.append(arguments))
    evaluator = harness(folder, LmTask("generate", "test", metric=("exact_match",)))
    for examples in (range(7), [lengths.index(min(lengths))]):
        evaluator.score(model, "mine", examples)
        assert evaluator.grades("mine", examples) == ()
    assert asked == []

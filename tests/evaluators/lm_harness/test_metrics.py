"""Metrics and filters are those of the task, chosen by the study, computed as lm-eval does it."""

import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.lm_harness.keys import LmTask
from searchmerge.evaluators.lm_harness.metrics import TaskMetrics
from searchmerge.evaluators.score_kind import Whole
from tests.evaluators.lm_harness.tasks import harness, lm_eval_samples
from tests.evaluators.models import tiny_tokenizer


@pytest.mark.parametrize(
    ("task", "metric", "sign"),
    [("mc", "mcc", 1), ("mc", "brier_score", -1), ("texts", "bits_per_byte", -1)],
)
def test_a_metric_that_is_no_mean_is_aggregated_by_the_task(folder, model, task, metric, sign):
    theirs = HFLM(model, tokenizer=tiny_tokenizer(), batch_size=4)
    _, results = lm_eval_samples(folder, theirs, task)
    evaluator = harness(folder, LmTask(task, "test", metric=(metric,)))
    info = evaluator.tasks["mine"]
    assert (info.n_examples, info.metric, info.kind) == (7, metric, Whole())
    (score,) = evaluator.score(model, "mine", range(7))
    assert score == pytest.approx(sign * results[f"{metric},none"], rel=1e-5)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
@pytest.mark.parametrize("choices", [["yes", "no", "perhaps", "so"], ["", *"abc"]])
@pytest.mark.filterwarnings("ignore:divide by zero")  # by lm-eval
def test_a_metric_is_asked_for_once_for_each_likeliest_choice(folder, model, metric, choices):
    task = harness(folder, LmTask("mc", "test", metric=(metric,)))._tasks["mine"]
    metrics, requests = task.metrics, task.requests.of(range(7))
    assert metrics._goes_by_likeliest
    lm_eval_s, task._task.doc_to_choice = task._task.process_results, lambda doc: choices
    n_computed, draw = [], torch.Generator().manual_seed(0)

    def computed(doc, answers):
        n_computed.append(1)
        return lm_eval_s(doc, answers)

    task._task.process_results = computed
    for _ in range(30):
        for group in requests:
            values = -torch.randint(1, 5, (len(group),), generator=draw) / 4  # some are alike
            for request, value in zip(group, values.tolist(), strict=True):
                request.filtered_resps = {"none": (value, False)}
            answers = [request.filtered_resps["none"] for request in group]
            assert (
                metrics.value(group, metrics.decides) == lm_eval_s(group[0].doc, answers)[metric]
            )
    assert len(n_computed) <= 4 * 7 if all(choices) else len(n_computed) == 30 * 7


def test_a_filter_of_the_task_may_be_chosen(folder, model):
    evaluator = harness(folder, LmTask("generate", "test", filter="word"))
    theirs = HFLM(model, tokenizer=tiny_tokenizer(), batch_size=4)
    samples, _ = lm_eval_samples(folder, theirs, "generate")
    expected = [s["exact_match"] for s in samples if s["filter"] == "word"]
    assert evaluator.score(model, "mine", range(7)) == tuple(expected)


def test_a_metric_may_name_its_filter_as_lm_evals_results_do(folder, model):
    named = harness(folder, LmTask("generate", "test", metric=("exact_match,word",)))
    apart = harness(folder, LmTask("generate", "test", metric=("exact_match",), filter="word"))
    assert named.score(model, "mine", range(7)) == apart.score(model, "mine", range(7))
    with pytest.raises(SpecError, match=r"filter: no 'words' in the task \(it has: first, word"):
        harness(folder, LmTask("generate", "test", metric=("exact_match,words",)))
    with pytest.raises(ValueError, match="names a filter"):
        LmTask("generate", "test", metric=("exact_match,word",), filter="first")


def test_a_metric_of_which_less_is_better_is_negated(folder, model):
    (score,) = harness(folder, LmTask("worse_is_higher", "validation")).score(model, "mine", [0])
    (acc,) = harness(folder, LmTask("mc", "validation")).score(model, "mine", [0])
    assert score == -acc


def test_a_metric_that_cannot_be_computed_is_named(folder, model, tmp_path):
    metric = {"metric": "f1", "aggregation": "f1", "higher_is_better": True}  # of two choices only
    include = {"include": str(folder / "mc.yaml"), "task": "mine", "metric_list": [metric]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(include))
    with pytest.raises(SpecError, match=r"tasks\.mine: .*'f1'.*ValueError: Target is multiclass"):
        harness(tmp_path, LmTask("mine", "test")).score(model, "mine", range(7))


def test_a_score_that_is_not_finite_fails_the_candidate(folder, model, tmp_path):
    (tmp_path / "helpers.py").write_text("def nothing(doc, results):\n    return {'acc': 1e999}\n")
    (tmp_path / "mine.yaml").write_text(
        f"include: {folder}/mc.yaml\ntask: endless\nprocess_results: !function helpers.nothing\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    evaluator = harness(tmp_path, LmTask("endless", "test", samples=(5, 1, 4)))
    with pytest.raises(EvaluationError, match="'mine', document 5 of 'endless': acc is inf"):
        evaluator.score(model, "mine", [0])


def test_other_metrics_and_filters_are_told_beside_the_one_that_decides(folder, model):
    theirs = HFLM(model, tokenizer=tiny_tokenizer(), batch_size=4)
    for task, metrics in (
        ("mc", ("acc_norm", "acc")),
        ("generate", ("exact_match,word", "exact_match,first")),
    ):
        evaluator = harness(folder, LmTask(task, "test", metric=metrics))
        samples, _ = lm_eval_samples(folder, theirs, task)
        (decides, _, its_filter), (other, _, other_filter) = (m.partition(",") for m in metrics)
        by = {(s["doc_id"], s["filter"]): s for s in samples}
        scores = evaluator.score(model, "mine", range(7))
        assert scores == tuple(by[e, its_filter or "none"][decides] for e in range(7))
        [label] = evaluator.tasks["mine"].other_metrics
        told = [answer.metrics[label] for answer in evaluator.answers("mine", range(7))]
        assert told == [by[e, other_filter or "none"][other] for e in range(7)]
        assert evaluator.tasks["mine"].keeps_answers


def test_a_vote_of_more_answers_than_there_are_is_refused_by_name(folder, model):
    message = r"tasks\.mine: .*'maj@6' .*first 6.* got 5"
    with pytest.raises(SpecError, match=message):
        harness(folder, LmTask("voted", "test", filter="maj@6")).score(model, "mine", [0])


def test_a_metric_that_is_no_mean_can_decide_but_not_be_told_beside_another(folder):
    told = r"tasks\.mine\.metric: 'mcc' of 'mc' is no mean over examples"
    with pytest.raises(SpecError, match=told):
        harness(folder, LmTask("mc", "test", metric=("acc", "mcc")))
    with pytest.raises(SpecError, match=r"metric: no 'f1' in the task \(it has: acc, acc_norm"):
        harness(folder, LmTask("mc", "test", metric=("f1",)))


def test_what_a_task_reads_in_its_own_way_is_asked_for_each_time(folder):
    task = harness(folder, LmTask("mc", "test", metric=("acc",)))._tasks["mine"]
    own, spec = task._task, LmTask("mc", "test", metric=("acc",))
    assert TaskMetrics("mine", spec, own)._goes_by_likeliest
    own.process_results = lambda doc, answers: {"acc": 0.0}
    assert not TaskMetrics("mine", spec, own)._goes_by_likeliest

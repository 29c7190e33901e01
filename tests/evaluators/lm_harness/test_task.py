"""Examples are prompted, answered and scored as lm-eval does it."""

import pytest
import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.lm_harness.keys import LmTask
from searchmerge.evaluators.lm_harness.language_model import TransformersBackend, make_lm
from searchmerge.evaluators.score_kind import Whole
from tests.evaluators.lm_harness.tasks import (
    TASKS,
    documents,
    harness,
    lm_eval_samples,
)
from tests.evaluators.models import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("task", "metric"),
    [("mc", "acc"), ("mc", "acc_norm"), ("fewshot", "acc"), ("generate", "exact_match")],
)
def test_scores_are_those_of_evaluate(folder, model, task, metric):
    theirs = HFLM(model, tokenizer=tiny_tokenizer(), batch_size=4)
    samples, _ = lm_eval_samples(folder, theirs, task)
    expected = [s[metric] for s in samples if s["filter"] in ("none", "first")]
    evaluator = harness(folder, LmTask(task, "test", metric=(metric,)))
    assert evaluator.score(model, "mine", range(7)) == tuple(expected)


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


def test_fewshot_examples_are_drawn_once_by_the_seed(folder):
    def prompts(seed):
        evaluator = harness(folder, LmTask("fewshot", "test"), fewshot_seed=seed)
        return [evaluator.prompts("mine", i)[0] for i in range(7)]

    assert prompts(1) == prompts(1) != prompts(2)
    assert all("of train" in prompt and "of test" in prompt for prompt in prompts(1))


def test_the_study_may_change_the_number_of_fewshot_examples(folder):
    evaluator = harness(folder, LmTask("fewshot", "test", num_fewshot=3))
    assert evaluator.prompts("mine", 0)[0].count("of train") == 3


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


@pytest.mark.parametrize("task", ["mc", "fewshot"])
def test_samples_are_those_of_lm_eval(folder, model, task):
    lm = HFLM(model, tokenizer=tiny_tokenizer(), batch_size=4)
    chosen = [1, 4, 5]
    config = yaml.safe_load((folder / f"{task}.yaml").read_text())
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {k: str(folder / v) for k, v in files.items()}
    loaded = TaskManager(include_defaults=False).load([config])["tasks"]
    loaded[task].set_fewshot_seed(1234)
    results = evaluate(lm, {"tasks": loaded}, bootstrap_iters=0, samples={task: chosen})
    expected = {s["doc_id"]: s for s in results["samples"][task]}
    evaluator = harness(folder, LmTask(task, "test", samples=(5, 1, 4)))
    assert evaluator.tasks["mine"].n_examples == 3
    scores = evaluator.score(model, "mine", range(3))
    for example, (document, score) in enumerate(zip((5, 1, 4), scores, strict=True)):
        prompts = [arguments[0] for arguments in expected[document]["arguments"]]
        assert list(evaluator.prompts("mine", example)) == prompts
        assert score == pytest.approx(expected[document]["acc"])
    with pytest.raises(SpecError, match="samples: there is no position 7; the split 'test' has 7"):
        harness(folder, LmTask(task, "test", samples=(0, 7)))


def test_a_study_may_generate_otherwise_than_the_task_says(folder, model):
    lm = HFLM(model, tokenizer=tiny_tokenizer(), batch_size=4)
    generation = {"max_gen_toks": 3, "until": ["e"]}
    kwargs = TASKS["generate"]["generation_kwargs"] | generation
    samples, _ = lm_eval_samples(folder, lm, "generate", generation_kwargs=kwargs)
    expected = [s["exact_match"] for s in samples if s["filter"] == "first"]
    evaluator = harness(folder, LmTask("generate", "test", generation=generation))
    assert list(evaluator.score(model, "mine", range(7))) == pytest.approx(expected)
    with pytest.raises(SpecError, match=r"tasks\.mine\.generation: nothing is generated in 'mc'"):
        harness(folder, LmTask("mc", "test", generation=generation))


def test_a_metric_of_which_less_is_better_is_negated(folder, model):
    (score,) = harness(folder, LmTask("worse_is_higher", "validation")).score(model, "mine", [0])
    (acc,) = harness(folder, LmTask("mc", "validation")).score(model, "mine", [0])
    assert score == -acc


@pytest.mark.parametrize("task", ["mc", "texts", "generate"])
def test_logits_that_are_not_finite_fail_the_candidate_by_name(folder, task):
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    evaluator = harness(folder, LmTask(task, "test"))
    with pytest.raises(EvaluationError, match=r"task 'mine', example 4: .*not finite"):
        evaluator.score(broken, "mine", [4])


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
    with pytest.raises(EvaluationError, match="'mine', example 2: acc is inf"):
        harness(tmp_path, LmTask("endless", "test")).score(model, "mine", [2])


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


def test_what_the_model_said_is_told_with_what_a_filter_read_in_it(folder, model):
    evaluator = harness(folder, LmTask("generate", "test", filter="word"))
    theirs = HFLM(model, tokenizer=tiny_tokenizer(), batch_size=4)
    samples, _ = lm_eval_samples(folder, theirs, "generate")
    samples = [sample for sample in samples if sample["filter"] == "word"]
    evaluator.score(model, "mine", range(7))
    assert not evaluator.tasks["mine"].keeps_answers
    for sample, answer in zip(samples, evaluator.answers("mine", range(7)), strict=True):
        assert answer.example == sample["doc_id"]
        assert answer.question == sample["doc"]["question"]
        assert answer.expected == sample["target"]
        assert list(answer.said) == sample["resps"][0]
        assert list(answer.read) == sample["filtered_resps"]


@pytest.mark.parametrize("answer_filter", ["first", "maj@3", "maj@5"])
def test_answers_are_sampled_again_and_voted_on_as_in_lm_eval(folder, model, answer_filter):
    theirs = make_lm(tiny_tokenizer(), TransformersBackend(1024))
    theirs.model = model
    filters = [f for f in TASKS["voted"]["filter_list"] if f["name"] == answer_filter]
    samples, _ = lm_eval_samples(folder, theirs, "voted", filter_list=filters)
    evaluator = harness(folder, LmTask("voted", "test", filter=answer_filter))
    scores = evaluator.score(model, "mine", range(7))
    assert scores == tuple(sample["exact_match"] for sample in samples)
    for sample, answer in zip(samples, evaluator.answers("mine", range(7)), strict=True):
        assert list(answer.said) == sample["resps"][0]
        assert len(set(answer.said)) > 1
        assert list(answer.read) == sample["filtered_resps"]


@pytest.mark.parametrize("arguments", [{}, {"temperature": 1.3, "top_p": 0.9}])
def test_an_examples_answers_are_the_same_in_any_batch_order_and_process(folder, model, arguments):
    task = LmTask("voted", "test", filter="maj@5", answers="keep", generation=arguments)

    def said(examples, **how):
        evaluator = harness(folder, task, **how)  # as another process would make it
        scores = evaluator.score(model, "mine", examples)
        answers = [answer.said for answer in evaluator.answers("mine", examples)]
        return dict(zip(examples, zip(scores, answers, strict=True), strict=True))

    expected = said(range(7))
    assert all(len(set(answers)) > 1 for _, answers in expected.values())
    assert said([5, 0, 6, 2, 1, 4, 3]) == expected
    assert said(range(7), backend_tokens=64) == expected
    one_by_one = [said([example], backend_tokens=96)[example] for example in range(7)]
    assert one_by_one == list(expected.values())
    assert said(range(7), seed=1) != expected


def test_answers_are_drawn_where_a_temperature_says_so(folder, model):
    warm = LmTask("generate", "test", generation={"temperature": 1.0}, repeats=3, answers="keep")
    evaluator = harness(folder, warm)
    evaluator.score(model, "mine", range(7))
    assert any(len(set(answer.said)) > 1 for answer in evaluator.answers("mine", range(7)))


def test_a_study_may_say_how_often_each_example_is_answered(folder, model):
    theirs = make_lm(tiny_tokenizer(), TransformersBackend(1024))
    theirs.model = model
    filters = [f for f in TASKS["voted"]["filter_list"] if f["name"] == "maj@3"]
    samples, _ = lm_eval_samples(folder, theirs, "voted", filter_list=filters, repeats=3)
    evaluator = harness(folder, LmTask("voted", "test", filter="maj@3", repeats=3))
    evaluator.score(model, "mine", range(7))
    for sample, answer in zip(samples, evaluator.answers("mine", range(7)), strict=True):
        assert list(answer.said) == sample["resps"][0]
        assert len(answer.said) == 3
    with pytest.raises(SpecError, match=r"tasks\.mine\.repeats: 'generate' does not sample its"):
        harness(folder, LmTask("generate", "test", repeats=3))
    with pytest.raises(SpecError, match=r"tasks\.mine\.repeats: nothing is generated in 'mc'"):
        harness(folder, LmTask("mc", "test", repeats=3))


def test_a_vote_of_more_answers_than_there_are_is_refused_by_name(folder, model):
    message = r"tasks\.mine: .*'maj@6' .*first 6.* got 5"
    with pytest.raises(SpecError, match=message):
        harness(folder, LmTask("voted", "test", filter="maj@6")).score(model, "mine", [0])


def test_of_choices_the_likeliest_is_what_was_said(folder, model):
    evaluator = harness(folder, LmTask("mc", "test", answers="keep"))
    scores = evaluator.score(model, "mine", range(7))
    assert evaluator.tasks["mine"].keeps_answers
    for score, answer in zip(scores, evaluator.answers("mine", range(7)), strict=True):
        assert (answer.read[0].strip() == answer.expected) == bool(score)
        assert [text.rpartition(" (")[0].strip() for text in answer.said] == list(
            next(
                doc["choices"]
                for doc in documents("test", 7)
                if doc["question"] in answer.question
            )
        )

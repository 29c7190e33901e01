"""Examples are prompted, answered and scored as lm-eval does it."""

import pytest
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from searchmerge.errors import SpecError
from searchmerge.evaluators.lm_harness.backend import TransformersBackend
from searchmerge.evaluators.lm_harness.keys import LmTask
from searchmerge.evaluators.lm_harness.language_model import make_lm
from tests.evaluators.lm_harness.tasks import (
    TASKS,
    documents,
    harness,
    lm_eval_samples,
)
from tests.evaluators.models import tiny_tokenizer


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


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_of_choices_the_likeliest_by_the_metric_is_what_was_said(folder, model, metric):
    evaluator = harness(folder, LmTask("mc", "test", metric=(metric,), answers="keep"))
    scores = evaluator.score(model, "mine", range(7))
    assert evaluator.tasks["mine"].keeps_answers
    for score, answer in zip(scores, evaluator.answers("mine", range(7)), strict=True):
        [doc] = [doc for doc in documents("test", 7) if doc["question"] in answer.question]
        is_there_twice = doc["choices"].count(answer.expected) > 1  # one of the two is right
        is_right = answer.read[0].strip() == answer.expected
        assert is_right == bool(score) or (is_right and is_there_twice)
        assert [text.rpartition(" (")[0].strip() for text in answer.said] == doc["choices"]

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from searchmerge import assemble
from searchmerge.check import check_study
from searchmerge.config import RunConfig
from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.lm_harness.evaluator import LmHarness
from searchmerge.evaluators.lm_harness.keys import LmHarnessSection, LmTask
from searchmerge.evaluators.lm_harness.language_model import TransformersBackend, make_lm
from searchmerge.evaluators.score_kind import Mean, Whole
from searchmerge.execution.executor import InProcessExecutor
from searchmerge.models import open_models
from searchmerge.search.references import reference_plans
from searchmerge.study import read_study
from tests.evaluators.models import tiny_model, tiny_tokenizer
from tests.studies_of_tasks import write_tasks
from tests.tiny import make_models, make_study

WORDS = ["fox", "dog", "cat", "horse", "fog", "word", "the lazy dog", "maybe"]
MEAN = {"aggregation": "mean", "higher_is_better": True}

MULTIPLE_CHOICE = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "doc_to_text": "question: {{question}} answer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
}
GENERATE = {
    "dataset_path": "json",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["the", "\n"], "max_gen_toks": 8},
}
TASKS = {
    "mc": MULTIPLE_CHOICE
    | {
        "validation_split": "validation",
        "test_split": "test",
        "metric_list": [
            {"metric": "acc", **MEAN},
            {"metric": "acc_norm", **MEAN},
            {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True},
            {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
        ],
    },
    "worse_is_higher": MULTIPLE_CHOICE
    | {
        "validation_split": "validation",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}],
    },
    "fewshot": MULTIPLE_CHOICE
    | {
        "test_split": "test",
        "fewshot_split": "train",
        "num_fewshot": 1,
        "metric_list": [{"metric": "acc", **MEAN}],
    },
    "shown": MULTIPLE_CHOICE
    | {
        "validation_split": "validation",
        "fewshot_split": "validation",
        "metric_list": [{"metric": "acc", **MEAN}],
    },
    "texts": {
        "dataset_path": "json",
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        ],
    },
    "generate": GENERATE
    | {
        "test_split": "test",
        "metric_list": [{"metric": "exact_match", **MEAN}],
        "filter_list": [
            {"name": "first", "filter": [{"function": "take_first"}]},
            {
                "name": "word",
                "filter": [
                    {"function": "regex", "regex_pattern": "([a-z]+)"},
                    {"function": "take_first"},
                ],
            },
        ],
    },
    "sampled": GENERATE
    | {
        "test_split": "test",
        "generation_kwargs": {
            "until": ["\n"],
            "max_gen_toks": 8,
            "do_sample": True,
            "temperature": 1.0,
        },
        "metric_list": [{"metric": "bypass", "aggregation": "mean", "higher_is_better": True}],
    },
}


def documents(split, n):
    for i in range(n):
        words = [WORDS[(i * 3 + k * k + len(split)) % len(WORDS)] for k in range(4)]
        yield {"question": f"the {' '.join(words[::-1])} of {split} {i}?", "choices": words}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tasks whose data files are named relative to it."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data").mkdir()
    for split, n in (("train", 6), ("validation", 10), ("test", 7)):
        lines = [json.dumps(doc | {"answer": i % 4}) for i, doc in enumerate(documents(split, n))]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    files = {split: f"data/{split}.jsonl" for split in ("train", "validation", "test")}
    for name, task in TASKS.items():
        settings = {"dataset_kwargs": {"data_files": files}, "metadata": {"version": 1.0}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | task | settings))
    group = {"group": "both", "task": ["mc", "texts"], "metadata": {"version": 1.0}}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def harness(folder, task, tokenizer=None, **keys):
    return LmHarness(
        {"mine": task},
        tokenizer=tokenizer or tiny_tokenizer(),
        backend=TransformersBackend(1024),
        section=LmHarnessSection(include_path=() if folder is None else (".",), **keys),
        folder=folder or Path(),
    )


def lm_eval_samples(folder, lm, task, split="test", **overrides):
    """What lm-eval's own ``evaluate`` says of each example, data files made absolute for it."""
    config = yaml.safe_load((folder / f"{task}.yaml").read_text())
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {k: str(folder / v) for k, v in files.items()}
    loaded = TaskManager(include_defaults=False).load([config | overrides])["tasks"]
    loaded[task].set_fewshot_seed(1234)
    results = evaluate(lm, {"tasks": loaded}, bootstrap_iters=0)
    return results["samples"][task], results["results"][task]


# --- Equal to HFLM ---------------------------------------------------------------------------

SHOTS = "a fox is a kind of animal. a dog is a kind of animal. which word is a kind of"
ANIMALS = ("fox", "dog", "cat", "horse", "lazy dog")
ANSWERS = (" yes", " no", " maybe not", " yes")  # one of them twice
REQUESTS = [
    ("question: what is a fox? answer:", " a dog"),
    ("question: what is a fox? answer:", " a dog"),
    ("question: what is a fox? answer:", " a quick horse"),
    ("question: what is a fox? answer:", "."),
    ("question: what is a fox? answer: ", "a dog"),  # a trailing space
    ("question: what is a fox? answer:  ", " no"),
    ("question: what is a dog? answer:", " a fox"),
    ("", "the quick brown fox"),
    ("", "a"),
    ("", "<s>the dog"),  # begins with the prefix token
    ("<s>the quick", " brown"),
    ("lazy dog " * 30, "jumps over"),  # longer than the window
    *((f"{SHOTS} question: is it a {animal}? answer:", a) for animal in ANIMALS for a in ANSWERS),
    ("the", " fox jumps over the lazy dog" * 4),
]


def instances(kind, arguments):
    return [
        Instance(kind, {}, each if isinstance(each, tuple) else (each,), i, ("t", i, 1))
        for i, each in enumerate(arguments)
    ]


@pytest.fixture(params=["llama", "gpt2", "qwen2", "bloom"])
def both(request):
    """Our language model and lm-eval's, around the same weights.

    With its cache of logits, HFLM 0.4.13 gives a wrong log-likelihood to a window whose tokens
    are those of another one that has more tokens to predict, as in a text that repeats itself.
    """
    model = tiny_model(request.param)
    theirs = HFLM(
        model, tokenizer=tiny_tokenizer(), batch_size=3, max_length=64, logits_cache=False
    )
    ours = make_lm(tiny_tokenizer(), TransformersBackend(96), max_length=64)
    ours.model = model
    return ours, theirs


@pytest.mark.parametrize("added", [True, False])
def test_the_token_that_begins_a_text_is_added_as_in_hflm(tmp_path, added):
    make_models(tmp_path)
    base = tmp_path / "base"
    theirs = HFLM(str(base), add_bos_token=added, device="cpu")
    ours = make_lm(base, TransformersBackend(96), add_bos_token=added)
    for text in ("w1 is a", "<s> w1 is a", ""):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, False) == theirs.tok_encode(text, False)
    assert (ours.tok_encode("w1")[0] == ours.prefix_token_id) == added


def test_log_likelihoods_are_those_of_hflm(both):
    ours, theirs = both
    found = ours.loglikelihood(instances("loglikelihood", REQUESTS))
    expected = theirs.loglikelihood(instances("loglikelihood", REQUESTS), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_log_likelihoods_are_those_of_hflm(both):
    ours, theirs = both
    texts = ["the quick brown fox", "a", "", "the lazy dog is a kind of horse. " * 12]
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(
        instances("loglikelihood_rolling", texts), disable_tqdm=True
    )
    windows = 1 + max(map(len, texts)) // 64
    assert found == pytest.approx(expected, abs=1e-4 * windows)  # HFLM adds in float32
    ours.model = ours.model.double()
    exact = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    assert found == pytest.approx(exact, abs=1e-4)


def test_generated_texts_are_those_of_hflm(both):
    ours, theirs = both
    greedy = {"until": ["the", "."], "max_gen_toks": 12}
    prompts = [
        ("question: what is a fox?", greedy),
        ("a", greedy),
        ("the lazy dog " * 30, greedy),
        ("the", {"until": "\n", "max_gen_toks": 5}),
        ("a word that rhymes", {"until": [], "max_gen_toks": 20, "do_sample": False}),
        ("maybe", {"until": ["no"], "max_gen_toks": 6, "num_beams": 2}),
    ]
    found = ours.generate_until(instances("generate_until", prompts))
    expected = theirs.generate_until(instances("generate_until", prompts), disable_tqdm=True)
    assert found == expected


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


def test_our_model_serves_lm_eval_itself(folder, model):
    ours = make_lm(tiny_tokenizer(), TransformersBackend(96))
    ours.model = model
    theirs = HFLM(model, tokenizer=tiny_tokenizer(), batch_size=4)
    assert lm_eval_samples(folder, ours, "mc")[1] == pytest.approx(
        lm_eval_samples(folder, theirs, "mc")[1], nan_ok=True
    )


# --- Examples, splits and prompts ------------------------------------------------------------


def test_scores_do_not_depend_on_earlier_calls_or_other_examples(folder, model):
    evaluator = harness(folder, LmTask("fewshot", "test"))
    whole = evaluator.score(model, "mine", range(7))
    assert evaluator.score(model, "mine", [5, 0, 3]) == (whole[5], whole[0], whole[3])
    assert evaluator.score(model, "mine", range(7)) == whole
    assert harness(folder, LmTask("fewshot", "test")).score(model, "mine", [3]) == (whole[3],)


def test_sampling_is_repeatable(folder, model):
    lm = make_lm(tiny_tokenizer(), TransformersBackend(96))
    lm.model = model
    arguments = TASKS["sampled"]["generation_kwargs"]
    requests = instances("generate_until", [("the dog", arguments), ("a fox", arguments)])
    before = torch.random.get_rng_state()
    assert lm.generate_until(requests) == lm.generate_until(requests)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("split", "n"), [("validation", 10), ("test", 7), ("train", 6)])
def test_the_split_that_the_study_names_is_scored(folder, model, split, n):
    evaluator = harness(folder, LmTask("mc", split))
    info = evaluator.tasks["mine"]
    assert (info.n_examples, info.metric, info.kind) == (n, "acc", Mean())
    assert len(evaluator.score(model, "mine", range(n))) == n
    assert f"of {split} " in evaluator.prompts("mine", 0)[0]


def test_fewshot_examples_are_drawn_once_by_the_seed(folder):
    def prompts(seed):
        evaluator = harness(folder, LmTask("fewshot", "test"), fewshot_seed=seed)
        return [evaluator.prompts("mine", i)[0] for i in range(7)]

    assert prompts(1) == prompts(1) != prompts(2)
    assert all("of train" in prompt and "of test" in prompt for prompt in prompts(1))


def test_the_study_may_change_the_number_of_fewshot_examples(folder):
    evaluator = harness(folder, LmTask("fewshot", "test", num_fewshot=3))
    assert evaluator.prompts("mine", 0)[0].count("of train") == 3


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


def test_chat_templates_make_turns_of_the_prompt(folder):
    tokenizer = tiny_tokenizer()
    chat = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    evaluator = harness(
        folder, LmTask("fewshot", "test"), with_template(tokenizer, chat), chat_template=True
    )
    prompt = evaluator.prompts("mine", 0)[0]
    assert prompt.startswith("[user]") and "[assistant]" in prompt


def with_template(tokenizer, template):
    copy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    copy.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    copy.chat_template = template
    return copy


def test_a_filter_of_the_task_may_be_chosen(folder, model):
    evaluator = harness(folder, LmTask("generate", "test", filter="word"))
    theirs = HFLM(model, tokenizer=tiny_tokenizer(), batch_size=4)
    samples, _ = lm_eval_samples(folder, theirs, "generate")
    expected = [s["exact_match"] for s in samples if s["filter"] == "word"]
    assert evaluator.score(model, "mine", range(7)) == tuple(expected)


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


def test_a_metric_of_which_less_is_better_is_negated(folder, model):
    (score,) = harness(folder, LmTask("worse_is_higher", "validation")).score(model, "mine", [0])
    (acc,) = harness(folder, LmTask("mc", "validation")).score(model, "mine", [0])
    assert score == -acc


def test_the_model_keeps_its_mode(folder, model):
    model.train()
    harness(folder, LmTask("mc", "test")).score(model, "mine", [0])
    assert model.training
    model.eval()


# --- What is refused -------------------------------------------------------------------------


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


def test_a_tokenizer_without_a_chat_template_is_refused(folder):
    with pytest.raises(SpecError, match="no chat template"):
        harness(folder, LmTask("mc", "test"), chat_template=True)


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


def test_a_continuation_longer_than_the_window_is_refused(folder, model):
    evaluator = harness(folder, LmTask("mc", "test"), max_length=2)
    with pytest.raises(SpecError, match="tokens; allowed are 1 to 2"):
        evaluator.score(model, "mine", range(7))


def test_a_generation_longer_than_the_window_is_refused(folder, model):
    evaluator = harness(folder, LmTask("generate", "test"), max_length=8)
    message = r"generation\.max_gen_toks: 8 tokens are to be generated; allowed are up to 7"
    with pytest.raises(SpecError, match=rf"tasks\.mine: {message}"):
        evaluator.score(model, "mine", [0])


def test_check_refuses_a_generation_longer_than_the_window(tmp_path):
    make_models(tmp_path)
    make_study(tmp_path)
    write_tasks(tmp_path)
    generation = {"max_gen_toks": 200}
    tasks = {"said": {"split": "validation", "generation": generation}}
    study = read_study(make_study(tmp_path, tasks=tasks))
    message = "generation.max_gen_toks: 200 tokens are to be generated; allowed are up to 63"
    with pytest.raises(SpecError, match=rf"tasks\.said: 'said': {message}"):
        list(check_study(study, RunConfig()))


def test_a_generation_longer_than_the_window_is_refused_before_there_is_a_model(folder, model):
    def make(n_tokens):
        return LmHarness(
            {"mine": LmTask("generate", "test", generation={"max_gen_toks": n_tokens})},
            tokenizer=tiny_tokenizer(),
            backend=TransformersBackend(1024),
            section=LmHarnessSection(include_path=(".",)),
            folder=folder,
            config=model.config,
        )

    make(63)
    message = r"generation\.max_gen_toks: 64 tokens are to be generated; allowed are up to 63"
    with pytest.raises(SpecError, match=rf"tasks\.mine: 'generate': {message}"):
        make(64)


def test_the_package_is_imported_without_lm_eval():
    source = Path("searchmerge/evaluators/lm_harness/task.py").read_text(encoding="utf-8")
    assert "\nfrom lm_eval" not in source and "\nimport lm_eval" not in source


def test_a_candidate_with_logits_that_are_not_finite_fails_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path / "cache"))
    make_models(tmp_path)
    weights = load_file(tmp_path / "second" / "model.safetensors")
    weights["model.norm.weight"][0] = 1e38  # ten times that is infinite
    save_file(weights, tmp_path / "second" / "model.safetensors", metadata={"format": "pt"})
    study = read_study(make_study(tmp_path))
    config = RunConfig(engine="eager", device="cpu")
    worker = assemble.make_worker(study, open_models(study), config)
    executor = InProcessExecutor(worker)
    rounds = assemble.make_schedule(study, worker.tasks()).rounds["pilot"][:1]
    good = reference_plans(study.experts)["task arithmetic"]
    broken = replace(good, values={"coefficient": ((0.4, 10.0),)})
    events = []
    for job, plan in enumerate((good, broken, good)):
        executor.submit(job, plan, rounds)
        while executor.n_free == 0:
            events.append(executor.next_event(1.0))
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["Scored", "Finished", "Failed", "Scored", "Finished"]
    first = rounds[0][0]
    assert f"task '{first.task}', example {first.examples[0]}: " in events[2].reason
    assert "not finite" in events[2].reason
    assert events[0].result.scores == events[3].result.scores


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

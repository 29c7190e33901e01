"""Small lm-eval tasks of every kind, and what lm-eval itself makes of them."""

from pathlib import Path

import yaml
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from searchmerge.evaluators.lm_harness.backend import TransformersBackend
from searchmerge.evaluators.lm_harness.evaluator import LmHarness
from searchmerge.evaluators.lm_harness.keys import LmHarnessSection
from tests.evaluators.models import tiny_tokenizer

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
TASKS["open"] = TASKS["sampled"] | {"doc_to_target": ""}
_OF_FIRST_LETTER = {"function": "regex", "regex_pattern": "([a-z])"}
TASKS["voted"] = TASKS["sampled"] | {
    "repeats": 5,
    "metric_list": [{"metric": "exact_match", **MEAN}],
    "filter_list": [
        {"name": "first", "filter": [_OF_FIRST_LETTER, {"function": "take_first"}]},
        *(
            {
                "name": f"maj@{k}",
                "filter": [
                    _OF_FIRST_LETTER,
                    {"function": "take_first_k", "k": k},
                    {"function": "majority_vote"},
                    {"function": "take_first"},
                ],
            }
            for k in (3, 5, 6)
        ),
    ],
}


def documents(split, n):
    for i in range(n):
        words = [WORDS[(i * 3 + k * k + len(split)) % len(WORDS)] for k in range(4)]
        yield {"question": f"the {' '.join(words[::-1])} of {split} {i}?", "choices": words}


def harness(
    folder,
    task,
    tokenizer=None,
    *,
    seed=0,
    backend=None,
    backend_tokens=1024,
    is_graded=True,
    learns=None,
    config=None,
    **keys,
):
    return LmHarness(
        {"mine": task},
        tokenizer=tokenizer or tiny_tokenizer(),
        backend=backend or TransformersBackend(backend_tokens),
        seed=seed,
        is_graded=is_graded,
        learns=learns,
        config=config,
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


def instances(kind, arguments):
    return [
        Instance(kind, {}, each if isinstance(each, tuple) else (each,), i, ("t", i, 1))
        for i, each in enumerate(arguments)
    ]


def with_template(tokenizer, template):
    copy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    copy.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    copy.chat_template = template
    return copy

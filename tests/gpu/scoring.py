"""Scoring and generating beside lm-eval's ``HFLM`` at its best batch size: speed and answers."""

import gc
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from searchmerge.evaluators.causal.model import BATCH_TOKENS
from tests.benchmarks.bench_merging import SHAPES, Shape
from tests.benchmarks.bench_scoring import Case, Contest, Measured, Timer
from tests.gpu.report import Figures, Step, Wrong
from tests.tiny import save_tokenizer

CASES = (
    Case("4 choices, 0-shot", "gpu_choices", 256, (128, 256)),
    Case("4 choices, shared 5-shot prefix", "gpu_fewshot", 96, (64, 128)),
    Case("rolling log-likelihood", "gpu_rolling", 64, (16, 32)),
    # Whose passes launch kernels for longer than these run: the more prompts at once, the better.
    Case("generation", "gpu_generate", 96, (128,)),
)
N_SMALL = 6
N_EXACT = 24
"""Examples that are compared in float32, where every answer must be the same."""

_WINDOW = 2048  # tokens

_APART = 1e-3
"""Of the largest score, by which float32 may differ between two ways to run texts."""


@dataclass(frozen=True)
class Scoring:
    """Where scoring is measured.

    Attributes:
        device: The device.
        small: Whether all is done in small, as on a CPU.
        folder: For the tasks and their data.
    """

    device: str
    small: bool
    folder: Path

    def steps(self) -> list[Step]:
        """Return the steps."""
        if self.small:
            return [Step("scoring", "tiny", lambda: self._compared("tiny", torch.float32, 1))]
        return [
            Step("scoring", "1b", lambda: self._compared("1b", torch.bfloat16, 1), 60),
            Step("scoring", "1b in float32", lambda: self._compared("1b", torch.float32, 1), 50),
        ]

    def more(self) -> list[Step]:
        """Return what is measured where there is time for it."""
        if self.small:
            return []
        return [Step("scoring", "3b", lambda: self._compared("3b", torch.bfloat16, 1), 60)]

    def _compared(self, size: str, dtype: torch.dtype, rounds: int) -> Figures:
        begun = time.perf_counter()
        shape = SHAPES[size]
        tokenizer = self._prepare(shape)
        exact = dtype == torch.float32
        cases = [self._cut(case, exact=exact) for case in CASES]
        with language_model(shape, dtype, self.device) as model:
            contest = Contest(
                model,
                tokenizer,
                self.folder,
                Timer(cpu_time=False),
                batch_tokens=BATCH_TOKENS[self.device.partition(":")[0]],
                cases=cases,
            )
            yield {"what": "model and tasks", "seconds": time.perf_counter() - begun}
            for case in cases:
                begun = time.perf_counter()
                found = contest.measure(case, case.n_examples, rounds)
                yield self._told(case, found, exact=exact) | {"s": time.perf_counter() - begun}
                yield from self._ways(contest, case, exact=exact)
                if exact and found.n_same != found.n_examples:
                    raise Wrong(
                        f"{case.title}: {found.n_examples - found.n_same} of {found.n_examples} "
                        f"answers in float32 are not HFLM's"
                    )

    def _ways(self, contest: Contest, case: Case, *, exact: bool) -> Figures:
        """Time packed rows beside one text a row, and passes of usual size beside larger ones."""
        if case.task == "gpu_generate":
            return
        times = contest.ways(case, case.n_examples)
        (usual, scores), (plain, _), (larger, _) = times.values()
        yield {
            "what": f"{case.title}, one text a row to packed",
            "value": plain / usual,
            "packed s": usual,
            "one a row s": plain,
            "passes twice as large s": larger,
            "a study takes": str(contest.tuned(case, case.n_examples) or "the usual way"),
        }
        apart = max(
            abs(one - other)
            for _, others in times.values()
            for one, other in zip(scores, others, strict=True)
        )
        if exact and apart > _APART * max(map(abs, scores)):
            raise Wrong(f"{case.title}: scores in float32 differ by {apart:.3g} between ways")

    def _cut(self, case: Case, *, exact: bool) -> Case:
        """Return a case with as many examples and batch sizes as there is time for."""
        most = N_SMALL if self.small else N_EXACT if exact else case.n_examples
        sizes = case.batch_sizes[:1] if exact or self.small else case.batch_sizes
        return replace(case, n_examples=min(most, case.n_examples), batch_sizes=sizes)

    def _told(self, case: Case, found: Measured, *, exact: bool) -> dict[str, Any]:
        """Return the figures of a case; the goal is beside ``HFLM`` without lm-eval's own work."""
        goal = {"at least": 2.0 if "choices" in case.task else 1.0}
        return {
            "what": f"{case.title}, HFLM's time to ours",
            "value": found.requests_s / found.ours_s,
            "with lm-eval's own": found.ratio,
            "HFLM s": found.requests_s,
            "at batch": found.batch_size,
            "our s": found.ours_s,
            "max Δ": found.difference,
            "same": f"{found.n_same}/{found.n_examples}",
            **({} if exact else goal),
        }

    def _prepare(self, shape: Shape) -> Any:
        """Write the tasks and the tokenizer, whose every word is a token; return the latter."""
        from transformers import AutoTokenizer

        words = ["<s>", "</s>", *(f"w{i}" for i in range(shape.vocabulary - 2))]
        save_tokenizer(self.folder, words)
        write_tasks(self.folder, words, N_SMALL + 6 if self.small else None)
        return AutoTokenizer.from_pretrained(self.folder)


@contextmanager
def language_model(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Any]:
    """Yield a Llama of some shape with seeded random weights, made on the device."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(llama_config(shape))
    finally:
        torch.set_default_dtype(default)
    try:
        yield model.eval().requires_grad_(requires_grad=False)
    finally:
        del model
        gc.collect()


def llama_config(shape: Shape) -> Any:
    from transformers import LlamaConfig

    head = 128 if shape.width > 2048 else min(64, shape.width_kv)
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.width // head,
        num_key_value_heads=shape.width_kv // head,
        max_position_embeddings=_WINDOW,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def write_tasks(folder: Path, words: list[str], n_rows: int | None) -> None:
    """Write the tasks' YAMLs and their data: words drawn with a seed."""
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words[2:], k=draw.randint(low, high)))

    small = n_rows is not None
    questions = [
        {
            "question": text(40, 90),
            "choices": [text(3, 12) for _ in range(4)],
            "answer": draw.randrange(4),
        }
        for _ in range(n_rows or 500)
    ]
    texts = [{"text": text(20, 200 if small else 1500)} for _ in range(n_rows or 100)]
    _write_rows(folder / "questions.jsonl", questions)
    _write_rows(folder / "texts.jsonl", texts)
    choices = {
        "task": "gpu_choices",
        **_data(folder / "questions.jsonl"),
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [_metric("acc")],
    }
    first = {"num_fewshot": 5, "fewshot_split": "validation"}
    fewshot = {
        **choices,
        "task": "gpu_fewshot",
        **first,
        "fewshot_config": {"sampler": "first_n"},
    }
    generate = {
        "task": "gpu_generate",
        **_data(folder / "questions.jsonl"),
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {
            "until": ["w3 "],
            "max_gen_toks": 8 if small else 64,
            "do_sample": False,
        },
        "metric_list": [_metric("exact_match")],
    }
    rolling = {
        "task": "gpu_rolling",
        **_data(folder / "texts.jsonl"),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        ],
    }
    for task in (choices, fewshot, generate, rolling):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))


def _data(file: Path) -> dict[str, Any]:
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(file)}},
        "validation_split": "validation",
    }


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

"""Compares the ``lm_harness`` evaluator with lm-eval's own ``HFLM`` on the quickstart's model.

    python tests/benchmarks/bench_scoring.py [--quick] [--model DIR] [--threads 2]

Prints one markdown table: for each kind of task and each dtype the seconds that ``evaluate``
takes with ``HFLM`` at its best batch size, the seconds that ``LmHarness.score`` takes, both the
best of several runs that take turns, and how far the two agree. Then, for each dtype, what a trial
of 300 examples takes beside the model's forward passes; merging is measured elsewhere.
"""

import argparse
import io
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from searchmerge.evaluators.causal.tuning import Way
from searchmerge.evaluators.lm_harness.backend import TransformersBackend
from searchmerge.evaluators.lm_harness.evaluator import LmHarness
from searchmerge.evaluators.lm_harness.keys import LmHarnessSection, LmTask
from searchmerge.evaluators.lm_harness.language_model import make_lm

STUDY = Path(__file__).parents[2] / "studies" / "quickstart"
BATCH_SIZES = (8, 16, 32, 64)  # of HFLM, from small to large


@dataclass(frozen=True)
class Case:
    """A kind of task.

    Attributes:
        title: Its name in the table.
        task: Its name in lm-eval.
        n_examples: How many examples are scored.
        batch_sizes: Among which ``HFLM``'s is chosen, from small to large.
        is_chat: Whether prompts are turns of the tokenizer's chat template.
        members: The tasks of a group; as many examples are scored of each.
    """

    title: str
    task: str
    n_examples: int
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    is_chat: bool = False
    members: tuple[str, ...] = ()

    @property
    def lm_names(self) -> tuple[str, ...]:
        """Return the tasks of lm-eval that are scored."""
        return self.members or (self.task,)


OWN = ("hypernym", "rhyme", "spelling")
CASES = (
    Case("4 choices, 0-shot (hypernym)", "quickstart_hypernym", 120),
    Case("4 choices, 0-shot (rhyme)", "quickstart_rhyme", 120),
    Case("4 choices, 0-shot (spelling)", "quickstart_spelling", 80),
    Case("4 choices, shared 5-shot prefix", "bench_fewshot", 40),
    Case("4 choices, drawn 5-shot prefix", "bench_drawn", 24),
    Case("4 choices, shared prefix of 2,000 tokens", "bench_long", 4, (8,)),
    Case("4 choices, chat template", "bench_chat", 40, is_chat=True),
    Case(
        "group of 3 tasks, chat template",
        "bench_group",
        48,
        is_chat=True,
        members=tuple(f"quickstart_{name}" for name in OWN),
    ),
    Case("rolling log-likelihood", "bench_rolling", 24),
    Case("generation, 5-shot", "bench_generate_fewshot", 24),
    Case("generation", "bench_generate", 48),
)


def own_task(name: str) -> dict[str, Any]:
    """Return one of the quickstart's tasks; lm-eval itself needs absolute paths in it."""
    task: dict[str, Any] = yaml.safe_load((STUDY / "tasks" / f"{name}.yaml").read_text())
    files = {"validation": str(STUDY / "tasks" / "data" / f"{name}.jsonl")}
    return task | {"dataset_kwargs": {"data_files": files}}


def long_task(folder: Path, first: dict[str, Any]) -> dict[str, Any]:
    """Return a task whose prompts all begin with the same 2,000 tokens, more or less."""
    task = own_task("rhyme") | first | {"task": "bench_long", "num_fewshot": 150}
    files = task["dataset_kwargs"]["data_files"]
    rows = Path(files["validation"]).read_text(encoding="utf-8").splitlines(keepends=True)
    shown = folder / "shown.jsonl"
    shown.write_text("".join(rows[-160:]), encoding="utf-8")
    task["dataset_kwargs"] = {"data_files": files | {"train": str(shown)}}
    return task | {"training_split": "train", "fewshot_split": "train"}


def write_tasks(folder: Path) -> None:
    """Write the tasks' YAMLs, and the texts of the rolling one."""
    lines = (STUDY / "tasks" / "data" / "spelling.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    texts = [" ".join(questions[i : i + 2 + i % 9]) for i in range(len(questions) - 10)]
    texts_file = folder / "texts.jsonl"
    texts_file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fewshot = own_task("rhyme") | {"num_fewshot": 5, "fewshot_split": "validation"}
    generate = own_task("rhyme") | {
        "task": "bench_generate",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
        ],
    }
    del generate["doc_to_choice"]
    rolling = {
        "task": "bench_rolling",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(texts_file)}},
        "output_type": "loglikelihood_rolling",
        "validation_split": "validation",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        ],
    }
    tasks = [own_task(name) for name in OWN]
    first = {"num_fewshot": 5, "fewshot_split": "validation"}
    first["fewshot_config"] = {"sampler": "first_n"}
    tasks.append(fewshot | {"task": "bench_fewshot"} | first)
    tasks.append(own_task("rhyme") | {"task": "bench_chat"})
    tasks.append(long_task(folder, first))
    tasks.append(generate | {"task": "bench_generate_fewshot"} | first)
    tasks += [fewshot | {"task": "bench_drawn"}, generate, rolling]
    for task in tasks:
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    members = [f"quickstart_{name}" for name in OWN]
    group = {"group": "bench_group", "task": members, "aggregate_metric_list": [mean]}
    (folder / "bench_group.yaml").write_text(yaml.safe_dump(group))


class Timer:
    """Measures seconds: of the clock, or of the processor where others use the machine too."""

    def __init__(self, *, cpu_time: bool) -> None:
        self.now = time.process_time if cpu_time else time.perf_counter

    def __call__(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds that a call takes, and what it returns."""
        start = self.now()
        with redirect_stderr(io.StringIO()):  # lm-eval's progress bars
            result = function()
        return self.now() - start, result


@dataclass(frozen=True)
class Measured:
    """How one case was scored both ways.

    Attributes:
        batch_size: At which ``HFLM`` was fastest.
        theirs_s: Seconds that it took, at its best.
        requests_s: Of these, those that it took to answer lm-eval's requests.
        ours_s: Seconds that we took, at our best.
        difference: The largest of log-likelihoods; ``None`` where there are none.
        n_same: Examples with the same answer.
        n_examples: All examples.
    """

    batch_size: int
    theirs_s: float
    requests_s: float
    ours_s: float
    difference: float | None
    n_same: int
    n_examples: int

    @property
    def ratio(self) -> float:
        return self.theirs_s / self.ours_s

    def cells(self) -> list[str]:
        """Return them as cells of the table."""
        return [
            str(self.n_examples),
            f"{self.theirs_s:.2f} ({self.batch_size})",
            f"{self.ours_s:.2f}",
            f"{self.ratio:.1f}",
            "" if self.difference is None else f"{self.difference:.1e}",
            f"{self.n_same}/{self.n_examples}",
        ]


class Contest:
    """One model, scored both ways.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        folder: Where the tasks' YAMLs are.
        timer: Measures seconds.
        batch_tokens: Of our passes.
        cases: What may be scored.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: Path,
        timer: Timer,
        *,
        batch_tokens: int,
        cases: Sequence[Case] = CASES,
    ) -> None:
        self._model = model
        self._timed = timer
        self._tokenizer = tokenizer
        tasks = {
            case.task: LmTask(case.task, "validation", chat_template=case.is_chat or None)
            for case in cases
        }
        backend = TransformersBackend(batch_tokens)
        self._harness = LmHarness(
            tasks,
            tokenizer=tokenizer,
            backend=backend,
            section=LmHarnessSection(include_path=(".",)),
            folder=folder,
        )
        self._lm = make_lm(tokenizer, backend)
        self._lm.model = model
        self._manager = TaskManager(include_path=str(folder), include_defaults=False)
        names = dict.fromkeys(name for case in cases for name in case.lm_names)
        self._tasks = self._manager.load(list(names))["tasks"]

    def evaluate(self, lm: Any, case: Case, limit: int) -> Any:
        """Return lm-eval's own result; the tasks and their data are loaded already."""
        tasks = {name: self._tasks[name] for name in case.lm_names}
        for task in tasks.values():
            task.set_fewshot_seed(1234)
        return evaluate(
            lm,
            {"tasks": tasks},
            limit=max(1, limit // len(tasks)),
            bootstrap_iters=0,
            apply_chat_template=case.is_chat,
        )

    def hflm(self, batch_size: int, spent: list[float] | None = None) -> Any:
        """Return lm-eval's model around ours.

        Args:
            batch_size: Of its passes.
            spent: Where to add the seconds that it takes to answer requests.
        """
        lm = HFLM(pretrained=self._model, tokenizer=self._tokenizer, batch_size=batch_size)
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, kind, partial(self._answered, getattr(lm, kind), spent))
        return lm

    def _answered(
        self, answer: Callable[..., Any], spent: list[float] | None, *given: Any, **options: Any
    ) -> Any:
        """Return what a method of a language model answers, and note how long it takes."""
        seconds, answers = self._timed(lambda: answer(*given, **options))
        if spent is not None:
            spent.append(seconds)
        return answers

    def best_batch_size(self, case: Case, n_examples: int) -> int:
        """Return the batch size at which ``HFLM`` is fastest on a third of the examples.

        It is on 48 of them where there are more.
        """
        if len(case.batch_sizes) == 1:
            return case.batch_sizes[0]
        limit = max(8, min(48, n_examples // 3))
        self.evaluate(self.hflm(case.batch_sizes[0]), case, 8)  # kernels are chosen and loaded
        seconds = {}
        for size in case.batch_sizes:
            try:
                seconds[size], _ = self._timed(
                    lambda size=size: self.evaluate(self.hflm(size), case, limit)
                )
            except torch.OutOfMemoryError:
                break  # larger ones need more
        return min(seconds, key=lambda size: seconds[size])

    def measure(self, case: Case, n_examples: int, rounds: int) -> Measured:
        """Return how long one case takes both ways, and how far the answers agree."""
        size, answering = self.best_batch_size(case, n_examples), []
        lm = self.hflm(size, answering)
        examples = self._examples(case, n_examples)
        self._harness.score(self._model, case.task, examples)  # prompts are made once a study
        theirs, ours, requests = [], [], []
        for _ in range(rounds):
            answering.clear()
            seconds, result = self._timed(lambda: self.evaluate(lm, case, n_examples))
            theirs.append(seconds)
            requests.append(sum(answering))
            seconds, _ = self._timed(lambda: self._harness.score(self._model, case.task, examples))
            ours.append(seconds)
        _, again = self._timed(lambda: self.evaluate(self._lm, case, n_examples))
        samples, others = (
            [sample for name in case.lm_names for sample in found["samples"][name]]
            for found in (result, again)
        )
        difference, n_same = compare(samples, others)
        best = min(theirs), min(requests), min(ours)
        return Measured(size, *best, difference, n_same, len(samples))

    def ways(self, case: Case, n_examples: int) -> dict[Way, tuple[float, list[float]]]:
        """Return the seconds and the scores of each way to run a task's texts."""
        examples, found = self._examples(case, n_examples), {}
        for way in (Way(), Way(packs=False), Way(growth=2)):
            self._harness.use(case.task, way._asdict())
            self._harness.score(self._model, case.task, examples)
            seconds, scores = self._timed(
                lambda: self._harness.score(self._model, case.task, examples)
            )
            found[way] = seconds, list(scores)
        self._harness.use(case.task, {})
        return found

    def tuned(self, case: Case, n_examples: int) -> dict[str, Any]:
        """Return what a study would be told of the ways; nothing on a CPU."""
        return self._harness.tune(self._model, case.task, self._examples(case, n_examples))

    def _examples(self, case: Case, n_examples: int) -> Sequence[int]:
        """Return the first examples of a task, or of each member of a group."""
        if not case.members:
            return range(n_examples)
        n_each = max(1, n_examples // len(case.members))
        members = self._harness.tasks[case.task].members_of("select")
        return [example for _, examples in members for example in examples[:n_each]]

    def overhead_s(self, n_examples: int, rounds: int) -> float:
        """Return the seconds of a trial outside the forward passes: the best of some trials.

        The trial scores choices of three tasks in turns, as a study's rounds do.
        """
        spent: list[float] = []
        now = self._timed.now
        handles = [
            self._model.register_forward_pre_hook(lambda *_: spent.append(-now())),
            self._model.register_forward_hook(lambda *_: spent.append(now())),
        ]
        tasks = [case.task for case in CASES[:3]]
        each = n_examples // len(tasks)
        found = []
        for _ in range(rounds + 1):  # the first lays out what the others run again
            spent.clear()
            seconds, _ = self._timed(
                lambda: [
                    self._harness.score(self._model, task, range(i, min(i + 32, each)))
                    for i in range(0, each, 32)
                    for task in tasks
                ]
            )
            found.append(seconds - sum(spent))
        for handle in handles:
            handle.remove()
        return min(found[1:])


def compare(first: Sequence[Any], second: Sequence[Any]) -> tuple[float | None, int]:
    """Return the largest difference of log-likelihoods, and how many answers are the same."""
    difference, same = 0.0, 0
    for one, other in zip(first, second, strict=True):
        answers = [[response[0] for response in sample["resps"]] for sample in (one, other)]
        if isinstance(answers[0][0], str):
            same += answers[0] == answers[1]
            continue
        values = [[float(a[0] if isinstance(a, list | tuple) else a) for a in s] for s in answers]
        difference = max([difference, *(abs(a - b) for a, b in zip(*values, strict=True))])
        same += values[0].index(max(values[0])) == values[1].index(max(values[1]))
    return (None if isinstance(answers[0][0], str) else difference), same


def main() -> None:
    """Run every case in both dtypes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the examples, one run")
    parser.add_argument("--model", type=Path, default=STUDY / "models" / "base")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processor")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--batch-tokens", type=int, default=512, help="of a pass; a study's default on a CPU"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", default=[case.task for case in CASES])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    print("| task | dtype | examples | HFLM s (batch) | searchmerge s | ratio | max Δ | same |")
    print("|---|---|---|---|---|---|---|---|")
    overheads = []
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        for name in options.dtypes:
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, name))
            contest = Contest(
                model.eval(),
                tokenizer,
                Path(folder),
                Timer(cpu_time=options.cpu_time),
                batch_tokens=options.batch_tokens,
            )
            for case in CASES:
                if case.task in options.cases:
                    n_examples = case.n_examples // 4 if options.quick else case.n_examples
                    found = contest.measure(case, n_examples, 1 if options.quick else 3)
                    cells = [case.title, name, *found.cells()]
                    print("| " + " | ".join(cells) + " |", flush=True)
            overheads.append((name, contest.overhead_s(300, 1 if options.quick else 3)))
    for name, seconds in overheads:
        print(f"\n{name}: {1000 * seconds:.0f} ms outside forward passes, a trial of 300 examples")


if __name__ == "__main__":
    main()

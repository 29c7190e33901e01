"""The scores of lm-eval's own harness, with its own model class, for a study's examples."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from searchmerge.errors import StudyError
from searchmerge.evaluators.lm_harness.evaluator import LmHarness
from searchmerge.evaluators.lm_harness.loading import explained, load_task, quiet, split_of
from searchmerge.evaluators.lm_harness.prompting import find_template
from searchmerge.evaluators.lm_harness.settings import may_show_itself
from searchmerge.evaluators.lm_harness.task import PreparedTask, TaskPart

_BATCH_SIZE = {"cpu": 4, "cuda": 16}
"""Requests of one forward pass, by kind of device."""


@dataclass(frozen=True)
class TheirScores:
    """What lm-eval gives for examples of a task.

    Attributes:
        values: Higher is better: one per example, or one in all if the score is no mean.
        notes: Why they may differ from this product's though nothing is wrong, a sentence each.
    """

    values: tuple[float, ...]
    notes: tuple[str, ...]


class OwnHarness:
    """Scores tasks with ``lm_eval.evaluator.evaluate`` and ``HFLM``, as its command line does.

    Args:
        ours: The evaluator whose tasks and examples are meant.
        model_dir: The model, with its tokenizer.
        dtype: That it is loaded in.
        device: Where it is run: a torch device.
        trust_remote_code: Whether Python files of the model may run.
    """

    def __init__(
        self,
        ours: LmHarness,
        *,
        model_dir: Path,
        dtype: torch.dtype,
        device: str,
        trust_remote_code: bool,
    ) -> None:
        self._ours = ours
        self._model_dir = model_dir
        self._dtype = dtype
        self._device = device
        self._trust_remote_code = trust_remote_code

    @cached_property
    def _lm(self) -> Any:
        from lm_eval.models.huggingface import HFLM

        class PartialHFLM(HFLM):  # type: ignore[misc]
            """Answers for the wanted documents alone; what else is asked gets a dummy.

            Where few-shot examples are drawn one prompt after the other, lm-eval has to be given
            all documents, for each prompt to be what it is in a whole run.

            Attributes:
                wanted: The documents that are answered for, by their place in the run.
            """

            wanted: frozenset[int] = frozenset()

            def loglikelihood(self, requests: Any, **options: Any) -> Any:
                return self._some(super().loglikelihood, requests, (0.0, False), options)

            def loglikelihood_rolling(self, requests: Any, **options: Any) -> Any:
                return self._some(super().loglikelihood_rolling, requests, 0.0, options)

            def generate_until(self, requests: Any, **options: Any) -> Any:
                return self._some(super().generate_until, requests, "", options)

            def _some(self, answer: Any, requests: Any, dummy: Any, options: Any) -> list[Any]:
                asked = [request.doc_id in self.wanted for request in requests]
                some = [r for r, is_asked in zip(requests, asked, strict=True) if is_asked]
                answers = iter(answer(some, **options) if some else ())
                return [next(answers) if is_asked else dummy for is_asked in asked]

        try:
            with quiet():
                return PartialHFLM(
                    pretrained=str(self._model_dir),
                    dtype=self._dtype,
                    device=self._device,
                    max_length=self._ours.section.max_length,
                    trust_remote_code=self._trust_remote_code,
                    **self._ours.section.model_args,
                    batch_size=self._batch_size,
                )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise StudyError(f"{self._model_dir}: lm-eval cannot load it: {reason}") from error

    @property
    def _batch_size(self) -> int:
        """Return how many requests are run at once.

        How much an encoder-decoder may say, and what BART reads, depends on the padding there.
        """
        if self._ours.reads == "seq2seq":
            return 1
        return _BATCH_SIZE.get(self._device.partition(":")[0], _BATCH_SIZE["cpu"])

    def score(self, task: str, examples: Sequence[int]) -> TheirScores:
        """Return what lm-eval gives for examples of a task, prompted as the study says.

        Raises:
            SpecError: If lm-eval cannot score the task.
        """
        by_place: dict[int, Any] = {}
        notes: dict[str, None] = {}
        parts = self._ours.parts(task, examples)
        for part in parts:
            by_place |= dict(zip(part.places, self._score_part(task, part), strict=True))
            notes |= dict.fromkeys(self._notes(part.task))
        values = [by_place[place] for place in range(len(examples))]
        return TheirScores(parts[0].task.metrics.aggregated(values), tuple(notes))

    def _notes(self, prepared: PreparedTask) -> Iterator[str]:
        name, spec, config = prepared.lm_name, prepared.spec, prepared.leaf.config
        split = split_of(prepared.leaf, spec.split, "split")
        if prepared.n_fewshot and may_show_itself(config, split):
            yield (
                f"lm-eval may show an example of {name!r} in its own few-shot prompt, answered, "
                "since both come from a split that is not called its test_split; here it is left "
                "out"
            )
        if prepared.samples_answers:
            yield f"answers of {name!r} are sampled, with other random numbers here and there"

    def _score_part(self, name: str, part: TaskPart) -> list[Any]:
        """Return lm-eval's value of the metric for each document."""
        from lm_eval.evaluator import evaluate

        prepared, section = part.task, self._ours.section
        task = load_task(
            name,
            prepared.spec,
            prepared.leaf,
            folder=self._ours.folder,
            allow_unsafe_code=section.confirm_run_unsafe_code,
            shown_itself=True,
        )
        task.set_fewshot_seed(section.fewshot_seed)
        documents = prepared.requests.prompted_with(part.documents)
        lm, lm_name = self._lm, prepared.lm_name
        wanted = set(part.documents)
        lm.wanted = frozenset(i for i, document in enumerate(documents) if document in wanted)
        samples = {lm_name: documents} if len(documents) < len(task.eval_docs) else None
        with explained(name, f"score its task {lm_name!r}"), quiet(), _silent():
            results = evaluate(
                lm,
                {"tasks": {lm_name: task}},
                samples=samples,
                bootstrap_iters=0,
                confirm_run_unsafe_code=section.confirm_run_unsafe_code,
                **self._prompting(prepared),
            )
        decides = prepared.metrics.decides
        values = {
            sample["doc_id"]: sample[decides.name]
            for sample in results["samples"][lm_name]
            if sample["filter"] == decides.filter
        }
        return [values[document] for document in part.documents]

    def _prompting(self, prepared: PreparedTask) -> dict[str, Any]:
        """Return how ``evaluate`` makes prompts; the chat template goes into the model class."""
        spec, lm = prepared.spec, self._lm
        said: dict[str, Any] = {"system_instruction": spec.system_instruction}
        if not spec.chat_template:
            return said
        template = find_template(
            lm.tokenizer, asked=spec.chat_template, where=str(self._model_dir)
        )
        lm.chat_template_args = {
            **dict(spec.template_arguments or {}),
            "chat_template": template,
        }
        multiturn = True if spec.fewshot_as_multiturn is None else spec.fewshot_as_multiturn
        return said | {"apply_chat_template": True, "fewshot_as_multiturn": multiturn}


@contextmanager
def _silent() -> Iterator[None]:
    """Keep lm-eval from logging what it does."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def harnesses(evaluators: Mapping[str, Any]) -> dict[str, LmHarness]:
    """Return the tasks that are lm-eval's, each with its evaluator."""
    return {name: e for name, e in evaluators.items() if isinstance(e, LmHarness)}

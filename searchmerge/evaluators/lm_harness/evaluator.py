"""The ``lm_harness`` evaluator: any task of lm-eval, scored fast on the resident model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from searchmerge.evaluators.evaluator import EVALUATORS, TaskInfo, evaluating
from searchmerge.evaluators.lm_harness.catalogue import Catalogue, LmTask
from searchmerge.evaluators.lm_harness.language_model import Backend, make_lm
from searchmerge.evaluators.lm_harness.task import PreparedTask


@EVALUATORS.register("lm_harness")
class LmHarness:
    """Scores lm-eval tasks with the resident model.

    Tasks, prompts and tokens are made once; a call to ``score`` runs forward passes and the
    task's own metric, nothing else.

    Args:
        tasks: The study's name of each task, and what it is.
        tokenizer: A tokenizer, or what ``AutoTokenizer.from_pretrained`` takes.
        include_path: Folder of the user's own task YAMLs. They come before lm-eval's tasks of
            the same name; ``data_files`` in them are relative to the YAML's folder.
        batch_tokens: Tokens of one forward pass, 1 or more.
        max_length: Window in tokens; the model's own if ``None``.
        fewshot_seed: Seed of the choice of few-shot examples.
        apply_chat_template: Whether prompts are turns of the tokenizer's chat template.
        backend: What runs the model; transformers in this process if ``None``.

    Raises:
        SpecError: If there is no such task, split, metric or filter.
    """

    def __init__(  # noqa: PLR0913 - what a study may say of its evaluator
        self,
        tasks: Mapping[str, LmTask],
        *,
        tokenizer: Any,
        include_path: Path | None = None,
        batch_tokens: int = 1024,
        max_length: int | None = None,
        fewshot_seed: int = 1234,
        apply_chat_template: bool = False,
        backend: Backend | None = None,
    ) -> None:
        self._lm = make_lm(
            tokenizer, batch_tokens=batch_tokens, max_length=max_length, backend=backend
        )
        chat = self._lm.chat_arguments() if apply_chat_template else {}
        catalogue = Catalogue(include_path)
        self._tasks = {
            name: PreparedTask(name, task, catalogue, fewshot_seed, chat)
            for name, task in tasks.items()
        }
        self.tasks: Mapping[str, TaskInfo] = {
            name: task.info for name, task in self._tasks.items()
        }

    def prompts(self, task: str, example: int) -> tuple[str, ...]:
        """Return what the model is given for an example: one text for each of its requests."""
        return self._tasks[task].prompts(example)

    def score(self, model: nn.Module, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return one number per example, higher is better (one in all if not a mean).

        Raises:
            EvaluationError: If a log-likelihood, the logits of a generation or the score itself
                is not finite.
        """
        if not examples:
            return ()
        prepared = self._tasks[task]
        with evaluating(model):
            self._lm.model = model
            return prepared.score(self._lm, examples)

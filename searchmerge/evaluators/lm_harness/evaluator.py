"""The ``lm_harness`` evaluator: any task of lm-eval, scored fast on the resident model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from searchmerge.evaluators.causal.model import BATCH_TOKENS, MODEL_CLASS
from searchmerge.evaluators.evaluator import (
    EVALUATORS,
    EvaluationContext,
    EvaluatorKind,
    TaskInfo,
    evaluating,
)
from searchmerge.evaluators.lm_harness.catalogue import Catalogue, LmTask
from searchmerge.evaluators.lm_harness.language_model import (
    Backend,
    TransformersBackend,
    make_lm,
)
from searchmerge.evaluators.lm_harness.task import PreparedTask
from searchmerge.evaluators.lm_harness.vllm import VllmBackend, VllmSettings


@dataclass(frozen=True)
class LmHarnessSection:
    """How lm-eval tasks are scored.

    Attributes:
        include_path: Folder of the user's own task YAMLs, from the study's folder on.
        batch_tokens: Tokens of one forward pass; by the device if ``None``.
        max_length: Window in tokens; the model's own if ``None``.
        fewshot_seed: Seed of the choice of few-shot examples.
        chat_template: Whether prompts are turns of the tokenizer's chat template.
        engine: What runs the model.
        vllm_memory: The part of the GPU's memory that vLLM may take.
    """

    include_path: str | None = None
    batch_tokens: Annotated[int, Ge(64)] | None = None
    max_length: Annotated[int, Ge(2)] | None = None
    fewshot_seed: int = 1234
    chat_template: bool = False
    engine: Literal["transformers", "vllm"] = "transformers"
    vllm_memory: Annotated[float, Gt(0), Lt(1)] = 0.5


class LmHarness:
    """Scores lm-eval tasks with the resident model.

    Tasks, prompts and tokens are made once; a call to ``score`` runs forward passes and the
    task's own metric, nothing else.

    Args:
        tasks: The study's name of each task, and what it is.
        tokenizer: A tokenizer, or what ``AutoTokenizer.from_pretrained`` takes.
        include_path: Folder of the user's own task YAMLs. They come before lm-eval's tasks of
            the same name; ``data_files`` in them are relative to the YAML's folder.
        backend: What runs the model.
        max_length: Window in tokens; the model's own if ``None``.
        fewshot_seed: Seed of the choice of few-shot examples.
        chat_template: Whether prompts are turns of the tokenizer's chat template.

    Raises:
        SpecError: If there is no such task, split, metric or filter.
    """

    def __init__(  # noqa: PLR0913 - what a study may say of its evaluator
        self,
        tasks: Mapping[str, LmTask],
        *,
        tokenizer: Any,
        backend: Backend,
        include_path: Path | None = None,
        max_length: int | None = None,
        fewshot_seed: int = 1234,
        chat_template: bool = False,
    ) -> None:
        self._backend = backend
        self._lm = make_lm(tokenizer, backend, max_length=max_length)
        chat = self._lm.chat_arguments() if chat_template else {}
        catalogue = Catalogue(include_path)
        self._tasks = {
            name: PreparedTask(
                name, replace(task, task=task.task or name), catalogue, fewshot_seed, chat
            )
            for name, task in tasks.items()
        }
        self.tasks: Mapping[str, TaskInfo] = {
            name: task.info for name, task in self._tasks.items()
        }

    def follow(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Let what runs the model take over the weights that a merge has left in it."""
        self._backend.follow(model, weights)

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


def _build(
    tasks: Mapping[str, LmTask], section: LmHarnessSection, context: EvaluationContext
) -> dict[str, LmHarness]:
    evaluator = LmHarness(
        tasks,
        tokenizer=context.model_dir,
        backend=_backend(section, context),
        include_path=context.folder / section.include_path if section.include_path else None,
        max_length=section.max_length,
        fewshot_seed=section.fewshot_seed,
        chat_template=section.chat_template,
    )
    return dict.fromkeys(tasks, evaluator)


def _backend(section: LmHarnessSection, context: EvaluationContext) -> Backend:
    if section.engine == "transformers":
        return TransformersBackend(context.sized(section.batch_tokens, BATCH_TOKENS))
    return VllmBackend(
        VllmSettings(context.model_dir, context.dtype, section.max_length, section.vllm_memory)
    )


EVALUATORS.register("lm_harness")(
    EvaluatorKind(
        keys=LmTask,
        section=LmHarnessSection,
        build=_build,
        model_classes=lambda tasks, section: (MODEL_CLASS,),
        places=lambda tasks, section: [section.include_path] if section.include_path else [],
        packages=lambda section: ["lm-eval"] + ["vllm"] * (section.engine == "vllm"),
        cost_keys=("vllm_memory",),
    )
)

"""The ``lm_harness`` evaluator: any task of lm-eval, scored fast on the resident model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from searchmerge.errors import SpecError
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
from searchmerge.evaluators.lm_harness.prompting import PromptKeys, prompted, request_arguments
from searchmerge.evaluators.lm_harness.task import PreparedTask
from searchmerge.evaluators.lm_harness.vllm import VllmBackend, VllmSettings
from searchmerge.evaluators.tokenizer import load_tokenizer


@dataclass(frozen=True)
class LmHarnessSection(PromptKeys):
    """How lm-eval tasks are scored.

    Attributes:
        include_path: Folders of the user's own task YAMLs, from the study's folder on. They come
            before lm-eval's tasks of the same name; ``data_files`` in them are relative to the
            YAML's folder.
        batch_tokens: Tokens of one forward pass; by the device if ``None``.
        max_length: Window in tokens; the model's own if ``None``.
        fewshot_seed: Seed of the choice of few-shot examples.
        metadata: What lm-eval hands to tasks that ask for it, e.g. RULER's lengths.
        confirm_run_unsafe_code: Whether tasks are scored that run what a model has written.
        engine: What runs the model.
        vllm_memory: The part of the GPU's memory that vLLM may take.
    """

    include_path: tuple[str, ...] = ()
    batch_tokens: Annotated[int, Ge(64)] | None = None
    max_length: Annotated[int, Ge(2)] | None = None
    fewshot_seed: int = 1234
    metadata: Mapping[str, Any] = field(default_factory=dict)
    confirm_run_unsafe_code: bool = False
    engine: Literal["transformers", "vllm"] = "transformers"
    vllm_memory: Annotated[float, Gt(0), Lt(1)] = 0.5


class LmHarness:
    """Scores lm-eval tasks with the resident model.

    Tasks, prompts and tokens are made once; a call to ``score`` runs forward passes and the
    task's own metric, nothing else.

    Args:
        tasks: The study's name of each task, and what it is.
        tokenizer: A tokenizer, or what ``AutoTokenizer.from_pretrained`` takes.
        backend: What runs the model.
        section: How tasks are scored.
        folder: What ``section.include_path`` is relative to.

    Raises:
        SpecError: If there is no such task, split, metric, filter or chat template.
    """

    def __init__(
        self,
        tasks: Mapping[str, LmTask],
        *,
        tokenizer: Any,
        backend: Backend,
        section: LmHarnessSection,
        folder: Path,
    ) -> None:
        self._backend = backend
        self._lm = make_lm(tokenizer, backend, max_length=section.max_length)
        catalogue = Catalogue(
            [folder / name for name in section.include_path],
            metadata=section.metadata,
            allow_unsafe_code=section.confirm_run_unsafe_code,
        )
        self._tasks = {}
        for name, task in tasks.items():
            task = prompted(replace(task, task=task.task or name), section)
            prompting = request_arguments(task, self._lm, f"tasks.{name}")
            self._tasks[name] = PreparedTask(
                name, task, catalogue, section.fewshot_seed, prompting
            )
        self.tasks: Mapping[str, TaskInfo] = {
            name: task.info for name, task in self._tasks.items()
        }

    def follow(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Let what runs the model take over the weights that a merge has left in it."""
        self._backend.follow(model, weights)

    def prompts(self, task: str, example: int) -> tuple[str, ...]:
        """Return what the model is given for an example: one text for each of its requests."""
        return self._tasks[task].prompts(example)

    def shown(self, task: str, example: int) -> str:
        """Return the example's first prompt as the model reads it, special tokens as text."""
        return str(self._lm.as_read(self.prompts(task, example)[0]))

    def doubts(self, task: str) -> list[str]:
        """Return that a chat template is not used, where the tokenizer has one."""
        if self._tasks[task].is_chat or not self._lm.tokenizer.chat_template:
            return []
        return [
            "the base's tokenizer has a chat template, which is not used; models tuned for chats "
            "score as deployed with lm_harness.chat_template: on"
        ]

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
        tokenizer=load_tokenizer(context.model_dir, trust_remote_code=context.trust_remote_code),
        backend=_backend(section, context),
        section=section,
        folder=context.folder,
    )
    return dict.fromkeys(tasks, evaluator)


def _backend(section: LmHarnessSection, context: EvaluationContext) -> Backend:
    if section.engine == "transformers":
        return TransformersBackend(context.sized(section.batch_tokens, BATCH_TOKENS))
    if context.base_dir is None:
        raise SpecError("lm_harness.engine: vllm cannot be given rows by `vocabulary: union`")
    return VllmBackend(
        VllmSettings(
            context.base_dir,
            context.dtype,
            section.max_length,
            section.vllm_memory,
            context.trust_remote_code,
        )
    )


EVALUATORS.register("lm_harness")(
    EvaluatorKind(
        keys=LmTask,
        section=LmHarnessSection,
        build=_build,
        model_classes=lambda tasks, section: (MODEL_CLASS,),
        places=lambda tasks, section: section.include_path,
        packages=lambda section: ["lm-eval"] + ["vllm"] * (section.engine == "vllm"),
        cost_keys=("vllm_memory",),
    )
)

"""The ``lm_harness`` evaluator: any task of lm-eval, scored fast on the resident model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from searchmerge.errors import SpecError
from searchmerge.evaluators.causal.model import BATCH_TOKENS, MODEL_CLASS
from searchmerge.evaluators.causal.tuning import Way
from searchmerge.evaluators.evaluator import (
    EVALUATORS,
    Answer,
    EvaluationContext,
    EvaluatorKind,
    LossKind,
    TaskInfo,
    evaluating,
)
from searchmerge.evaluators.lm_harness.backend import Backend, TransformersBackend
from searchmerge.evaluators.lm_harness.catalogue import Branch, Catalogue, Leaf
from searchmerge.evaluators.lm_harness.group import PreparedGroup
from searchmerge.evaluators.lm_harness.keys import LmHarnessSection, LmTask
from searchmerge.evaluators.lm_harness.language_model import make_lm
from searchmerge.evaluators.lm_harness.loading import load_task, split_of
from searchmerge.evaluators.lm_harness.parts import Prepared, PreparedParts
from searchmerge.evaluators.lm_harness.prompting import prompted, request_arguments
from searchmerge.evaluators.lm_harness.seq2seq import MODEL_CLASS as SEQ2SEQ
from searchmerge.evaluators.lm_harness.seq2seq import Seq2SeqBackend
from searchmerge.evaluators.lm_harness.settings import local_data, referred_files
from searchmerge.evaluators.lm_harness.task import PreparedTask, TaskPart
from searchmerge.evaluators.lm_harness.vllm import VllmBackend, VllmSettings
from searchmerge.evaluators.tokenizer import load_config, load_tokenizer


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
        config: The model's configuration, to see before there is a model that what tasks
            generate fits its window; that is seen when they are scored if ``None``.
        seed: Of answers that are drawn at random.
        is_graded: Whether it is told how clearly examples were answered.
        learns: The loss that plans are refined by: it is found out which examples lack it.

    Raises:
        SpecError: If there is no such task, split, metric, filter or chat template.
    """

    def __init__(  # noqa: PLR0913 - what a study's context says, in flat values
        self,
        tasks: Mapping[str, LmTask],
        *,
        tokenizer: Any,
        backend: Backend,
        section: LmHarnessSection,
        folder: Path,
        config: Any = None,
        seed: int = 0,
        is_graded: bool = True,
        learns: LossKind | None = None,
    ) -> None:
        self._is_graded = is_graded
        self._learns = learns
        self._ways: dict[str, Way] = {}
        self._backend = backend
        self._lm = make_lm(
            tokenizer,
            backend,
            max_length=section.max_length,
            add_bos_token=section.add_bos_token,
            seed=seed,
        )
        self.section = section
        self.folder = folder
        self._config = config
        self._catalogue = Catalogue(
            [folder / name for name in section.include_path], metadata=section.metadata
        )
        self._tasks = {name: self._prepare(name, task) for name, task in tasks.items()}
        self.tasks: Mapping[str, TaskInfo] = {
            name: task.info for name, task in self._tasks.items()
        }

    def _prepare(self, name: str, task: LmTask) -> Prepared | PreparedParts:
        parts = [self._prepare_part(name, part) for part in task.by_part()]
        return PreparedParts(name, *parts) if len(parts) > 1 else parts[0]

    def _prepare_part(self, name: str, task: LmTask) -> Prepared:
        task = prompted(task, self.section)
        tree = self._catalogue.find(task.task or name, f"tasks.{name}.task")
        if isinstance(tree, Leaf):
            return self._prepare_leaf(name, task, tree)
        if task.samples is not None:
            what = f"{tree.name!r} is a group of several tasks"
            raise SpecError(f"tasks.{name}.samples: {what}")
        of_leaves: list[PreparedTask] = []
        members: dict[tuple[str, str], PreparedTask] = {}
        for leaf in tree.leaves():
            key = leaf.name, split_of(leaf, task.split, f"tasks.{name}.split")
            if key not in members:
                chosen = replace(task, metric=task.metric or _metric_of(leaf, tree))
                members[key] = self._prepare_leaf(name, chosen, leaf)
            _check_same(members[key].leaf, leaf, f"tasks.{name}.task")
            of_leaves.append(members[key])
        return PreparedGroup(name, tree, of_leaves, task.metrics_and_filters()[0][0])

    def _prepare_leaf(self, name: str, task: LmTask, leaf: Leaf) -> PreparedTask:
        section = self.section
        loaded = load_task(
            name,
            task,
            leaf,
            folder=self.folder,
            allow_unsafe_code=section.confirm_run_unsafe_code,
        )
        prompting = request_arguments(task, self._lm, f"tasks.{name}")
        prepared = PreparedTask(name, task, leaf, loaded, section.fewshot_seed, prompting)
        if self._learns is not None:
            prepared.find_without_loss(self._learns, self._lm, self._config)
        if self._config is not None and prepared.generation is not None:
            try:
                self._lm.check_generation(prepared.generation, self._config)
            except SpecError as error:
                raise SpecError(f"tasks.{name}: {leaf.name!r}: {error}") from error
        return prepared

    @property
    def reads(self) -> str:
        """Return the kind of model, as lm-eval calls it."""
        return self._backend.reads

    def follow(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Let what runs the model take over the weights that a merge has left in it."""
        self._backend.follow(model, weights)

    def parts(self, task: str, examples: Sequence[int]) -> list[TaskPart]:
        """Return which documents of which tasks of lm-eval's the examples of a task are."""
        return self._tasks[task].parts(examples)

    def prompts(self, task: str, example: int) -> tuple[str, ...]:
        """Return what the model is given for an example: one text for each of its requests."""
        return self._tasks[task].prompts(example)

    def answers(self, task: str, examples: Sequence[int]) -> tuple[Answer, ...]:
        """Return what the model said to examples when they were last scored."""
        return self._tasks[task].answers(examples)

    def grades(self, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return how clearly examples were answered when they were last scored."""
        if not self._is_graded:
            return ()
        with evaluating(self._lm.model):
            return self._tasks[task].grades(self._lm, examples)

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

    def loss(self, model: nn.Module, task: str, examples: Sequence[int]) -> Tensor:
        """Return the loss of each example, as the task's kind has it."""
        with evaluating(model):
            self._lm.model = model
            return self._tasks[task].loss(self._lm, examples)

    def log_probabilities(
        self, model: nn.Module, task: str, examples: Sequence[int]
    ) -> list[Tensor]:
        """Return the log-probabilities of each example's choices."""
        with evaluating(model):
            self._lm.model = model
            return self._tasks[task].log_probabilities(self._lm, examples)

    def score(self, model: nn.Module, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return one number per example, higher is better (one in all if not a mean).

        Raises:
            EvaluationError: If a log-likelihood, the logits of a generation or the score itself
                is not finite.
        """
        if not examples:
            return ()
        self._backend.use(self._ways.get(task, Way()))
        return self._score(model, task, examples)

    def _score(self, model: nn.Module, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        with evaluating(model):
            self._lm.model = model
            return self._tasks[task].score(self._lm, examples)

    def tune(self, model: nn.Module, task: str, examples: Sequence[int]) -> dict[str, Any]:
        """Return how examples are scored soonest, and the seconds of each way that was tried.

        Where the study says how many tokens a forward pass has, that is kept to.
        """
        if any(part.task.generation is not None for part in self.parts(task, examples)):
            return {}
        times = self._backend.tune(
            model,
            lambda: self._score(model, task, examples),
            may_grow=self.section.batch_tokens is None,
        )
        if not times:
            return {}
        tried = [{**way._asdict(), "seconds": seconds} for way, seconds in times.items()]
        return {**next(iter(times))._asdict(), "tried": tried}

    def use(self, task: str, tuning: Mapping[str, Any]) -> None:
        """Score a task in the way that was measured."""
        chosen = {name: tuning[name] for name in Way._fields if name in tuning}
        self._ways[task] = Way(**chosen)


def _check_same(first: Leaf, other: Leaf, where: str) -> None:
    """Refuse a task that is in a group in two ways: trials would see held-out examples."""
    if first.overrides != other.overrides:
        raise SpecError(
            f"{where}: {first.name!r} stands there twice, with other settings "
            f"({' > '.join(first.path)}; {' > '.join(other.path)}); give the group's members as "
            "tasks of their own"
        )


def _metric_of(leaf: Leaf, tree: Branch) -> tuple[str, ...]:
    """Return the first of a group's metrics that a member has; none if it has none of them."""
    has = [str(m.get("metric")) for m in leaf.config.get("metric_list") or []]
    return tuple(metric.name for metric in tree.metrics if metric.name in has)[:1]


def _build(
    tasks: Mapping[str, LmTask], section: LmHarnessSection, context: EvaluationContext
) -> dict[str, LmHarness]:
    config = load_config(context.model_dir, trust_remote_code=context.trust_remote_code)
    evaluator = LmHarness(
        tasks,
        tokenizer=load_tokenizer(
            context.model_dir,
            trust_remote_code=context.trust_remote_code,
            add_bos_token=section.add_bos_token,
        ),
        backend=_backend(section, context, config),
        section=section,
        folder=context.folder,
        config=config,
        seed=context.seed,
        is_graded=context.is_graded,
        learns=context.learns,
    )
    return dict.fromkeys(tasks, evaluator)


def _backend(section: LmHarnessSection, context: EvaluationContext, config: Any) -> Backend:
    if section.engine == "transformers":
        encodes = getattr(config, "is_encoder_decoder", False)
        runs = Seq2SeqBackend if encodes else TransformersBackend
        return runs(context.sized(section.batch_tokens, BATCH_TOKENS))
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


def _referred(
    tasks: Mapping[str, LmTask], section: LmHarnessSection, folder: Path
) -> Iterator[Path]:
    for place in section.include_path:
        yield from referred_files(folder / Path(place).expanduser())
    for task in tasks.values():
        if isinstance(task.task, Mapping):
            yield from local_data(task.task, folder)


EVALUATORS.register("lm_harness")(
    EvaluatorKind(
        keys=LmTask,
        section=LmHarnessSection,
        build=_build,
        model_classes=lambda tasks, section: (MODEL_CLASS,),
        other_classes=lambda section: (SEQ2SEQ,) if section.engine == "transformers" else (),
        loading=lambda section: section.loading,
        places=lambda tasks, section: section.include_path,
        referred=_referred,
        packages=lambda section: ["lm-eval"] + ["vllm"] * (section.engine == "vllm"),
        free_keys=("vllm_memory", "answers"),
    )
)

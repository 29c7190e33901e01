"""The ``lm_harness`` evaluator: any task of lm-eval, scored fast on the resident model."""

import io
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import copy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from torch import nn

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.causal_generation import GenerationOptions, Generator, NonFiniteLogits
from searchmerge.evaluators.causal_scoring import CausalScorer
from searchmerge.evaluators.documents import Tokens
from searchmerge.evaluators.evaluator import EVALUATORS, TaskInfo, evaluating
from searchmerge.evaluators.lm_task_settings import data_files, split_overrides
from searchmerge.evaluators.tokenizer import load_tokenizer

_logger = logging.getLogger(__name__)

_MAX_GEN_TOKENS = 256
"""Tokens to generate where a task does not say, as in lm-eval."""


@dataclass(frozen=True)
class LmTask:
    """Which lm-eval task is scored, and how.

    Attributes:
        name: The task's name in lm-eval.
        split: The split of its dataset whose examples are scored.
        metric: One of the task's metrics; its first if ``None``.
        filter: One of the task's filters of the model's answers; its first if ``None``.
        num_fewshot: Examples that are shown before the question, 0 or more; what the task says
            if ``None``, and 0 if it says nothing.
    """

    name: str
    split: str
    metric: str | None = None
    filter: str | None = None
    num_fewshot: int | None = None


class Backend(Protocol):
    """Runs the model: scores continuations, and generates them.

    Attributes:
        spare: Tokens of the model's window that it cannot use for a prompt.
    """

    spare: int

    def score(
        self, model: nn.Module, pairs: Sequence[tuple[Tokens, Tokens]], max_length: int
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether it is the greedy one."""
        ...

    def generate(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Tokens],
        options: GenerationOptions,
    ) -> list[list[int]]:
        """Return the new tokens of every prompt; what follows a stop sequence is ignored."""
        ...


class TransformersBackend:
    """Runs the resident model itself.

    Args:
        batch_tokens: Tokens of one forward pass, 1 or more.
    """

    spare = 0

    def __init__(self, batch_tokens: int) -> None:
        self.score = CausalScorer(batch_tokens).score
        self.generate = Generator(batch_tokens).generate


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
        catalogue = _Catalogue(include_path)
        self._tasks = {
            name: _PreparedTask(name, task, catalogue, fewshot_seed, chat)
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


# --- The language model, as lm-eval sees it --------------------------------------------------


class ResidentLM:
    """What lm-eval asks of a language model, answered by whatever ``model`` is now.

    ``make_lm`` makes an ``lm_eval.api.model.TemplateLM`` of it.

    Attributes:
        model: The resident model; set before the first request.
    """

    backend = "causal"
    model: nn.Module

    def __init__(self, tokenizer: Any, *, runs: Backend, max_length: int | None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._runs = runs
        self._max_length = max_length
        # The choices of a question follow one another and share its text.
        self._encode = lru_cache(maxsize=16)(self._tokenize)
        self._pairs: dict[tuple[str, str], tuple[Tokens, Tokens]] = {}
        self._windows: dict[tuple[str, int], list[tuple[Tokens, Tokens]]] = {}

    @property
    def eot_token_id(self) -> int:
        """Return the id of the token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Return the id of the token that stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Return the window in tokens."""
        from lm_eval.models.utils import resolve_max_length

        whole = self._max_length or int(resolve_max_length(self.model.config, self.tokenizer))
        return whole - self._runs.spare

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        return next(self.model.parameters()).device

    @property
    def tokenizer_name(self) -> str:
        """Return the tokenizer's name, which lm-eval asks for with chat templates."""
        return str(self.tokenizer.name_or_path)

    def chat_arguments(self) -> dict[str, Any]:
        """Return what makes lm-eval build its prompts with the tokenizer's chat template."""
        if not self.tokenizer.chat_template:
            raise SpecError(f"the tokenizer {self.tokenizer_name!r} has no chat template to apply")
        return {
            "apply_chat_template": True,
            "fewshot_as_multiturn": True,
            "chat_template": self.apply_chat_template,
            "tokenizer_name": self.tokenizer_name,
        }

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,  # noqa: FBT001, FBT002 - lm-eval's signature
    ) -> str:
        """Return the prompt of a conversation."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:  # noqa: FBT001
        """Return the token ids of a text; one that begins with the prefix token gets no other."""
        return list(self._encode(string, add_special_tokens))

    def _tokenize(self, text: str, add_special_tokens: bool | None) -> Tokens:  # noqa: FBT001
        if add_special_tokens is None and text.startswith(self._prefix_text):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return tuple(self.tokenizer.encode(text, **options))

    @cached_property
    def _prefix_text(self) -> str:
        return str(self.tokenizer.decode([self.prefix_token_id]))

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        return self._score([self._pair(*request.args[:2]) for request in requests])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, ...]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(tuple(request[-2]), tuple(request[-1])) for request in requests])

    def _score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        return self._runs.score(self.model, pairs, self.max_length)

    def _pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """Return the token ids of a request, tokenised when it is first seen."""
        key = (context, continuation)
        if key not in self._pairs:
            encoded = self._encode_request(context, continuation)
            if not 0 < len(encoded[1]) <= self.max_length:
                raise SpecError(
                    f"the continuation {continuation!r} has {len(encoded[1])} tokens; allowed "
                    f"are 1 to {self.max_length}, the model's window"
                )
            self._pairs[key] = encoded
        return self._pairs[key]

    def _encode_request(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        if context:
            first, second = self._encode_pair(context, continuation)  # type: ignore[attr-defined]
            return tuple(first), tuple(second)
        tokens = self._encode(continuation, False)  # noqa: FBT003 - cached by position
        if tokens[:1] == (self.prefix_token_id,):
            return tokens[:1], tokens[1:]
        return (self.prefix_token_id,), tokens

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Return the log-likelihood of each text, in windows that fill the model's."""
        windows = [self._text_windows(request.args[0]) for request in requests]
        scores = iter(self._score([window for text in windows for window in text]))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def _text_windows(self, text: str) -> list[tuple[Tokens, Tokens]]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        key = (text, self.max_length)
        if key not in self._windows:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            self._windows[key] = [
                (tuple(context), tuple(tokens))
                for context, tokens in map(make_disjoint_window, rolling)
            ]
        return self._windows[key]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Return each prompt's continuation, up to the first of its stop sequences."""
        from lm_eval.models.utils import postprocess_generated_text

        texts = [""] * len(requests)
        for options, members in self._by_options(requests):
            room = self.max_length - options.max_new_tokens
            if room < 1:
                raise SpecError(
                    f"{options.max_new_tokens} tokens are to be generated; allowed are up to "
                    f"{self.max_length - 1}, the model's window less one token of the prompt"
                )
            prompts = [
                tuple(self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id])
                for i in members
            ]
            try:
                answers = self._runs.generate(self.model, self.tokenizer, prompts, options)
            except NonFiniteLogits as error:
                raise NonFiniteLogits(members[error.row]) from error
            for i, tokens in zip(members, answers, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                texts[i] = postprocess_generated_text(text, list(options.stop), None)
        return texts

    def _by_options(
        self, requests: Sequence[Any]
    ) -> Iterator[tuple[GenerationOptions, list[int]]]:
        """Yield the different ways of generating among the requests, and which ask for each."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(request.args[1])].append(i)
        for members in groups.values():
            yield self._options(requests[members[0]].args[1]), members

    def _options(self, arguments: dict[str, Any]) -> GenerationOptions:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        rest: dict[str, Any] = dict(normalize_gen_kwargs(arguments, _MAX_GEN_TOKENS))
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stop = handle_stop_sequences(rest.pop("until", None), eos=end)
        max_new_tokens = rest.pop("max_gen_toks")
        if not rest.get("do_sample") and not rest.get("temperature"):
            rest.pop("temperature", None)
        return GenerationOptions(tuple(stop), max_new_tokens, rest)


def make_lm(
    tokenizer: Any,
    *,
    batch_tokens: int,
    max_length: int | None = None,
    backend: Backend | None = None,
) -> Any:
    """Return a ``ResidentLM`` that is an ``lm_eval.api.model.LM``.

    Args:
        tokenizer: A tokenizer, or what ``AutoTokenizer.from_pretrained`` takes.
        batch_tokens: Tokens of one forward pass, 1 or more.
        max_length: Window in tokens; the model's own if ``None``.
        backend: What runs the model; transformers in this process if ``None``.
    """
    from lm_eval.api.model import TemplateLM

    class ResidentTemplateLM(ResidentLM, TemplateLM):  # type: ignore[misc]
        """Our answers under lm-eval's type."""

    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer = copy(tokenizer)
        tokenizer.pad_token_id = tokenizer.unk_token_id or tokenizer.eos_token_id
    return ResidentTemplateLM(
        tokenizer, runs=backend or TransformersBackend(batch_tokens), max_length=max_length
    )


# --- Tasks: loaded, prompted and tokenised once ----------------------------------------------


class _Catalogue:
    """Finds lm-eval tasks by name: the user's own first, then the thousands that it brings.

    Args:
        include_path: Folder of the user's task YAMLs.
    """

    def __init__(self, include_path: Path | None) -> None:
        if include_path is not None and not Path(include_path).is_dir():
            raise SpecError(f"include_path {str(include_path)!r} is not a folder")
        self._include_path = include_path

    @cached_property
    def _own(self) -> Any:
        return self._manager(include_defaults=False)

    @cached_property
    def _all(self) -> Any:
        _logger.info("indexing lm-eval's tasks, which takes some seconds")
        return self._manager(include_defaults=True)

    def _manager(self, *, include_defaults: bool) -> Any:
        from lm_eval.tasks import TaskManager

        path = None if self._include_path is None else str(self._include_path)
        return TaskManager(include_path=path, include_defaults=include_defaults)

    def find(self, name: str, where: str) -> tuple[Any, Any]:
        """Return the task manager that knows ``name``, and the task's entry in its index.

        Args:
            name: A task.
            where: Where the study names it, for messages.

        Raises:
            SpecError: If there is no such task, or it is a group of tasks.
        """
        manager = self._own if name in self._own.all_tasks else self._all
        if name in manager.all_groups or name in manager.all_tags:
            members = _members(manager, name)
            raise SpecError(
                f"{where}: {name!r} is a group of lm-eval tasks; list its tasks: {members}"
            )
        if name not in manager.all_subtasks:
            close = get_close_matches(name, manager.all_subtasks, n=3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            or_own = f" or in {self._include_path}" if self._include_path else ""
            raise SpecError(f"{where}: no task named {name!r} in lm-eval{or_own}{hint}")
        return manager, manager.task_index[name]


def _members(manager: Any, name: str) -> str:
    """Return the names of a group's or tag's direct members."""
    entry = manager.task_index[name]
    members = sorted(entry.tags) if name in manager.all_tags else (entry.cfg or {}).get("task", [])
    if isinstance(members, str):
        members = [members]
    return ", ".join(
        str(m.get("task", m.get("group"))) if isinstance(m, dict) else m for m in members
    )


class _PreparedTask:
    """One task: its examples, its requests with every prompt, and how answers become scores.

    Args:
        name: The study's name of the task.
        spec: What the study says of it.
        catalogue: Where lm-eval's tasks are found.
        fewshot_seed: Seed of the choice of few-shot examples.
        chat: Arguments that make prompts turns of a chat.

    Raises:
        SpecError: If there is no such task, split, metric or filter.
    """

    def __init__(
        self,
        name: str,
        spec: LmTask,
        catalogue: _Catalogue,
        fewshot_seed: int,
        chat: Mapping[str, Any],
    ) -> None:
        self._name = name
        self._spec = spec
        self._seed = fewshot_seed
        self._chat = chat
        self._task = load_task(name, spec, catalogue)
        metrics = list(self._task.aggregation())
        self._metric = _chosen(f"tasks.{name}.metric", spec.metric, metrics)
        self._filters = _filters(self._task)
        self._filter = _chosen(f"tasks.{name}.filter", spec.filter, list(self._filters))
        higher = self._task.higher_is_better().get(self._metric, True)
        self._sign = 1.0 if higher else -1.0
        self._aggregate = self._task.aggregation()[self._metric]
        self.info = TaskInfo(
            n_examples=len(self._task.eval_docs),
            mean=_is_mean(self._aggregate),
            metric=self._metric,
        )

    @cached_property
    def _requests(self) -> list[list[Any]]:
        """The requests of every example, made at first use: few-shot draws are in order."""
        task = self._task
        task.set_fewshot_seed(self._seed)
        with _explained(self._name, f"make prompts of its task {self._spec.name!r}"), _quiet():
            task.build_all_requests(limit=None, rank=0, world_size=1, **self._chat)
        requests: list[list[Any]] = [[] for _ in range(self.info.n_examples)]
        for request in sorted(task.instances, key=lambda request: request.idx):
            requests[request.doc_id].append(request)
        for template in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            _render_once(task, template)
        return requests

    def prompts(self, example: int) -> tuple[str, ...]:
        """Return the text of each request of an example, its continuation left out."""
        return tuple(str(request.args[0]) for request in self._requests[example])

    def score(self, lm: Any, examples: Sequence[int]) -> tuple[float, ...]:
        """Return one score per example, or one in all, higher is better."""
        requests = [self._requests[example] for example in examples]
        self._answer(lm, [request for group in requests for request in group])
        with _explained(self._name, f"compute {self._metric!r} of its task {self._spec.name!r}"):
            values = [self._value(group) for group in requests]
            if not self.info.mean:
                values = [self._aggregate(values)]
            scores = [self._sign * float(value) for value in values]
        for place, score in enumerate(scores):
            if not math.isfinite(score):
                which = f"example {examples[place]}" if self.info.mean else "all examples"
                raise EvaluationError(
                    f"task {self._name!r}, {which}: {self._metric} is {score}, not a finite number"
                )
        return tuple(scores)

    def _answer(self, lm: Any, requests: Sequence[Any]) -> None:
        """Ask the model, and leave its filtered answers in the requests."""
        by_type: dict[str, list[Any]] = defaultdict(list)
        for request in requests:
            request.resps, request.filtered_resps = [], {}
            by_type[request.request_type] += [request] * (request.repeats or 1)
        for kind, asked in by_type.items():
            try:
                answers = getattr(lm, kind)(asked)
            except NonFiniteLogits as error:
                raise self._not_finite(asked[error.row], "logits that are not finite") from error
            if kind != "generate_until":
                self._check_finite(asked, answers)
            for request, answer in zip(asked, answers, strict=True):
                request.resps.append(answer)
        self._filters[self._filter].apply(list(requests))

    def _check_finite(self, requests: Sequence[Any], answers: Sequence[Any]) -> None:
        values = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
        if all(map(math.isfinite, values)):
            return
        place = next(i for i, value in enumerate(values) if not math.isfinite(value))
        what = f"a log-likelihood of {values[place]}, which is not finite"
        raise self._not_finite(requests[place], what)

    def _not_finite(self, request: Any, what: str) -> EvaluationError:
        return EvaluationError(
            f"task {self._name!r}, example {request.doc_id}: the model gave {what}"
        )

    def _value(self, requests: Sequence[Any]) -> Any:
        """Return the metric of one example."""
        answers = [request.filtered_resps[self._filter] for request in requests]
        metrics = self._task.process_results(requests[0].doc, answers)
        if self._metric not in metrics:
            raise SpecError(
                f"tasks.{self._name}: lm-eval's {self._spec.name!r} gave no metric "
                f"{self._metric!r} for an example (it gave: {', '.join(metrics)})"
            )
        return metrics[self._metric]


def _chosen(key: str, asked: str | None, known: Sequence[str]) -> str:
    """Return ``asked``, or the first known name if nothing was asked for."""
    if asked is None:
        return known[0]
    if asked not in known:
        raise SpecError(f"{key}: no {asked!r} in the task (it has: {', '.join(known)})")
    return asked


def _filters(task: Any) -> dict[str, Any]:
    """Return the task's filter pipelines by name, made of its own configuration."""
    from lm_eval.filters import build_filter_ensemble

    pipelines = task.config.filter_list or [
        {"name": "none", "filter": [{"function": "take_first"}]}
    ]
    return {
        pipeline["name"]: build_filter_ensemble(
            pipeline["name"],
            [
                (step["function"], {k: v for k, v in step.items() if k != "function"})
                for step in pipeline["filter"]
            ],
        )
        for pipeline in pipelines
    }


def _is_mean(aggregate: Callable[..., Any]) -> bool:
    from lm_eval.api.registry import get_aggregation

    return aggregate in (get_aggregation("mean"), np.mean)


def _render_once(task: Any, field: str) -> None:
    """Have a template of the task rendered once for each example; lm-eval compiles it each time.

    A task takes a function wherever it takes a template.
    """
    template = getattr(task.config, field, None)
    if not isinstance(template, str) or template in getattr(task, "features", ()):
        return
    render = getattr(task, field)
    rendered: dict[int, tuple[Any, Any]] = {}

    def look_up(doc: Any) -> Any:
        if id(doc) not in rendered:
            rendered[id(doc)] = (doc, render(doc, template))  # the document keeps its id
        return rendered[id(doc)][1]

    task.set_config(field, look_up)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars of lm-eval and datasets, which cannot be turned off, off stderr."""
    with redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Turn what a task's own files got wrong into an error that names the task."""
    from jinja2 import TemplateError

    try:
        yield
    except SpecError:
        raise
    except (
        *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
        *(TypeError, ValueError, TemplateError, yaml.YAMLError),
    ) as error:
        raise SpecError(
            f"tasks.{name}: lm-eval could not {what} ({type(error).__name__}: {error})"
        ) from error


def load_task(name: str, spec: LmTask, catalogue: _Catalogue) -> Any:
    """Return lm-eval's task object, set to score the split that the study names.

    Raises:
        SpecError: If there is no such task or split, or the task cannot be scored here.
    """
    manager, entry = catalogue.find(spec.name, f"tasks.{name}.task")
    config = dict(entry.cfg or {})
    overrides = data_files(config, entry.yaml_path)
    with _explained(name, f"load its task {spec.name!r}"), _quiet():
        task = _build(manager, spec.name, overrides)
        splits = list(task.dataset)
        if spec.split not in splits:
            raise SpecError(
                f"tasks.{name}.split: lm-eval's {spec.name!r} has no split {spec.split!r} "
                f"(it has: {', '.join(map(str, splits))})"
            )
        if more := split_overrides(config, spec.split):
            task = _build(manager, spec.name, overrides | more)
    for feature in ("UNSAFE_CODE", "MULTIMODAL"):
        if getattr(task, feature, False):
            raise SpecError(
                f"tasks.{name}: lm-eval marks {spec.name!r} as {feature}, which is not scored here"
            )
    if "class" in config and task.eval_docs is not task.dataset[spec.split]:
        raise SpecError(
            f"tasks.{name}.split: {spec.name!r} is a Python class that chooses its split itself, "
            f"and not {spec.split!r}"
        )
    shots = spec.num_fewshot if spec.num_fewshot is not None else task.config.num_fewshot
    task.set_config("num_fewshot", shots or 0)
    return task


def _build(manager: Any, name: str, overrides: Mapping[str, Any]) -> Any:
    """Return a task with settings of its YAML replaced: a group of one may do so."""
    member = {"task": name, **overrides}
    loaded = manager.load({"group": "searchmerge", "task": [member]})
    return loaded["tasks"][name]

"""The ``perplexity`` evaluator: how likely a causal language model finds texts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
from annotated_types import Ge
from torch import Tensor, nn

from searchmerge.checkpoints.model_config import load_config
from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.causal.documents import Tokens
from searchmerge.evaluators.causal.model import BATCH_TOKENS, MODEL_CLASS
from searchmerge.evaluators.causal.scoring import CausalScorer
from searchmerge.evaluators.evaluator import (
    EVALUATORS,
    EvaluationContext,
    EvaluatorKind,
    LossKind,
    TaskInfo,
    evaluating,
    needed,
)
from searchmerge.evaluators.rows import (
    DataPlace,
    DataPlaces,
    DataSource,
    Sources,
    Splits,
    data_paths,
    data_sources,
    load_rows,
    rows_info,
    text_column,
)
from searchmerge.evaluators.tokenizer import load_tokenizer

METRIC = "mean_log_likelihood"


@dataclass(frozen=True)
class TextTask:
    """Texts, one an example.

    Attributes:
        data: Where its rows are.
        text: The column of the text.
    """

    data: Sources
    text: str = "text"


@dataclass(frozen=True)
class TextKeys:
    """The keys of a task whose texts are scored by their likelihood.

    Attributes:
        data: Where the texts are; or where those of ``select`` and of ``hold_out`` are.
        split: Which of its splits; not needed for a single file. Or one for each part.
        text: The column of the text.
    """

    data: DataPlace | DataPlaces = needed("give a file, a folder, or a dataset of the hub")
    split: str | Splits | None = None
    text: str = "text"


@dataclass(frozen=True)
class PerplexitySection:
    """How texts are scored by their likelihood.

    Attributes:
        batch_tokens: Tokens of one forward pass; by the device if ``None``.
        max_length: Window in tokens; the model's own if ``None``.
        stride: Tokens by which the window moves; half of it if ``None``.
    """

    batch_tokens: Annotated[int, Ge(64)] | None = None
    max_length: Annotated[int, Ge(2)] | None = None
    stride: Annotated[int, Ge(1)] | None = None


class Perplexity:
    """Scores texts by the mean log-likelihood of their tokens, in nats; higher is better.

    The perplexity of a text is ``exp(-score)``. A task's score is the mean over its texts, each
    counted once, however long it is. A text that is longer than the window is read in windows
    that overlap: every token is predicted once, and all but the first window's have at least
    ``max_length - stride`` tokens before them.

    Args:
        tasks: The study's name of each task, and what it is.
        model_dir: Where the base's tokenizer and configuration are.
        batch_tokens: Tokens of one forward pass, 1 or more.
        max_length: Window in tokens; the model's own if ``None``.
        stride: Tokens by which the window moves, in [1, max_length]; half of it if ``None``.
        trust_remote_code: Whether Python files of the model may run.

    Raises:
        SpecError: If data, split or column are not there, a text has no tokens, or the stride is
            out of its range.
    """

    def __init__(
        self,
        tasks: Mapping[str, TextTask],
        *,
        model_dir: Path,
        batch_tokens: int = 1024,
        max_length: int | None = None,
        stride: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        tokenizer = load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
        config = load_config(model_dir, trust_remote_code=trust_remote_code)
        self._max_length = max_length or window(config, tokenizer)
        self._stride = stride or max(1, self._max_length // 2)
        if self._stride > self._max_length:
            raise SpecError(
                f"perplexity.stride is {self._stride}; allowed are 1 to {self._max_length}, the "
                "window in tokens"
            )
        self._scorer = CausalScorer(batch_tokens)
        self._windows: dict[str, list[list[tuple[Tokens, Tokens]]]] = {}
        self.tasks: dict[str, TaskInfo] = {}
        for name, task in tasks.items():
            windows = [self._prepare(name, source, task.text, tokenizer) for source in task.data]
            self._windows[name] = [of_text for of_source in windows for of_text in of_source]
            n_rows, losses = list(map(len, windows)), get_args(LossKind)
            self.tasks[name] = rows_info(task.data, n_rows, metric=METRIC, losses=losses)

    def _prepare(
        self, name: str, source: DataSource, column: str, tokenizer: Any
    ) -> list[list[tuple[Tokens, Tokens]]]:
        """Return the windows of every text."""
        where = f"tasks.{name}"
        texts = text_column(load_rows(source, where), column, f"{where}.text")
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        prepared = []
        for row, text in enumerate(texts):
            tokens = tuple(tokenizer.encode(text, add_special_tokens=False))
            if first is None:  # nothing stands before a text: its first token is not predicted
                start, tokens = tokens[:1], tokens[1:]
            else:
                start = (int(first),)
            if not tokens:
                raise SpecError(f"{where}.text: row {row} is {text!r}, which has no tokens")
            prepared.append(text_windows(start, tokens, self._max_length, self._stride))
        return prepared

    def score(self, model: nn.Module, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return the mean log-likelihood of each text's tokens, in nats, at most 0.

        Raises:
            EvaluationError: If one is not finite.
        """
        texts = [self._windows[task][example] for example in examples]
        with evaluating(model):
            pairs = [pair for text in texts for pair in text]
            likelihoods = iter(self._scorer.score(model, pairs, self._max_length))
        scores = []
        for example, text in zip(examples, texts, strict=True):
            total = math.fsum(next(likelihoods)[0] for _ in text)
            score = total / sum(len(tokens) for _, tokens in text)
            if not math.isfinite(score):
                raise EvaluationError(
                    f"task {task!r}, example {example}: the model gave a log-likelihood of "
                    f"{score}, not a finite number"
                )
            scores.append(score)
        return tuple(scores)

    def loss(self, model: nn.Module, task: str, examples: Sequence[int]) -> Tensor:
        """Return each text's negative log-likelihood per token, in nats."""
        texts = [self._windows[task][example] for example in examples]
        with evaluating(model):
            pairs = [pair for text in texts for pair in text]
            likelihoods = self._scorer.log_likelihoods(model, pairs, self._max_length)
        by_text = torch.split(likelihoods, [len(text) for text in texts])
        n_tokens = [sum(len(tokens) for _, tokens in text) for text in texts]
        means = [of_text.sum() / n for of_text, n in zip(by_text, n_tokens, strict=True)]
        return -torch.stack(means)

    def log_probabilities(
        self, model: nn.Module, task: str, examples: Sequence[int]
    ) -> list[Tensor]:
        """Return what comes next at every token of each text, ``(n_tokens, vocabulary)``."""
        texts = [self._windows[task][example] for example in examples]
        with evaluating(model):
            pairs = [pair for text in texts for pair in text]
            given = iter(self._scorer.log_probabilities(model, pairs, self._max_length))
        return [torch.cat([next(given) for _ in text]) for text in texts]


def window(config: Any, tokenizer: Any) -> int:
    """Return how many tokens a model reads at once, by what is said of it."""
    config = getattr(config, "text_config", None) or config
    names = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length")
    said = [getattr(config, name, None) for name in names]
    return int(min([n for n in said if n] + [tokenizer.model_max_length, 1 << 20]))


def text_windows(
    start: Tokens, tokens: Tokens, max_length: int, stride: int
) -> list[tuple[Tokens, Tokens]]:
    """Return context and tokens to predict of every window on a text.

    Args:
        start: What stands before the text: one token.
        tokens: The text, 1 token or more.
        max_length: Tokens that the model reads at once, 1 or more.
        stride: Tokens that each window but the first predicts, in [1, max_length].
    """
    whole = start + tokens
    windows = [(start, whole[1 : max_length + 1])]
    done = len(windows[0][1]) + 1
    while done < len(whole):
        end = min(done + stride, len(whole))
        # The last token is predicted and not read.
        windows.append((whole[max(0, end - 1 - max_length) : done], whole[done:end]))
        done = end
    return windows


def _build(
    tasks: Mapping[str, TextKeys], section: PerplexitySection, context: EvaluationContext
) -> dict[str, Perplexity]:
    evaluator = Perplexity(
        {
            name: TextTask(data_sources(task.data, task.split, context.resolve), task.text)
            for name, task in tasks.items()
        },
        model_dir=context.model_dir,
        trust_remote_code=context.trust_remote_code,
        batch_tokens=context.sized(section.batch_tokens, BATCH_TOKENS),
        max_length=section.max_length,
        stride=section.stride,
    )
    return dict.fromkeys(tasks, evaluator)


EVALUATORS.register("perplexity")(
    EvaluatorKind(
        keys=TextKeys,
        section=PerplexitySection,
        build=_build,
        model_classes=lambda tasks, section: (MODEL_CLASS,),
        places=lambda tasks, section: [p for t in tasks.values() for p in data_paths(t.data)],
    )
)

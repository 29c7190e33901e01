"""The ``next_token`` evaluator: how likely a causal language model goes on with a given token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from searchmerge.errors import SpecError
from searchmerge.evaluators.causal.model import MODEL_CLASS
from searchmerge.evaluators.evaluator import (
    EVALUATORS,
    EvaluationContext,
    EvaluatorKind,
    NoKeys,
    TaskInfo,
    evaluating,
    needed,
)
from searchmerge.evaluators.rows import DataPlace, load_rows, text_column
from searchmerge.evaluators.tokenizer import load_tokenizer


@dataclass(frozen=True)
class NextTokenKeys:
    """The keys of a task whose texts are to be gone on with by one token.

    Attributes:
        data: Where the texts are.
        token: The token.
        text: The column of the text.
    """

    data: DataPlace = needed("give a file, a folder, or a dataset of the hub")
    token: str = needed("name the token that is to come next")
    text: str = "text"


class NextToken:
    """Scores a text by the probability of a token after it, in [0, 1]."""

    def __init__(self, tasks: Mapping[str, NextTokenKeys], context: EvaluationContext) -> None:
        tokenizer = load_tokenizer(context.model_dir, trust_remote_code=context.trust_remote_code)
        self._texts: dict[str, list[list[int]]] = {}
        self._tokens: dict[str, int] = {}
        for name, task in tasks.items():
            where = f"tasks.{name}"
            rows = load_rows(task.data.source(None, context.resolve), where)
            texts = text_column(rows, task.text, f"{where}.text")
            self._texts[name] = [tokenizer.encode(text) for text in texts]
            found = tokenizer.encode(task.token, add_special_tokens=False)
            if len(found) != 1:
                raise SpecError(f"{where}.token: {task.token!r} is {len(found)} tokens, not one")
            self._tokens[name] = found[0]
        self.tasks: Mapping[str, TaskInfo] = {
            name: TaskInfo(len(texts), metric="probability") for name, texts in self._texts.items()
        }

    @torch.no_grad()
    def score(self, model: nn.Module, task: str, examples: Sequence[int]) -> tuple[float, ...]:
        """Return the probability of the token after each text."""
        scores = []
        with evaluating(model):
            device = next(model.parameters()).device
            for example in examples:
                tokens = torch.tensor([self._texts[task][example]], device=device)
                logits = model(tokens).logits[0, -1].float()
                scores.append(float(logits.softmax(-1)[self._tokens[task]]))
        return tuple(scores)


def _build(
    tasks: Mapping[str, NextTokenKeys], section: NoKeys, context: EvaluationContext
) -> dict[str, NextToken]:
    return dict.fromkeys(tasks, NextToken(tasks, context))


EVALUATORS.register("next_token")(
    EvaluatorKind(
        keys=NextTokenKeys,
        build=_build,
        section=NoKeys,
        model_classes=lambda tasks, section: (MODEL_CLASS,),
        places=lambda tasks, section: [task.data.path for task in tasks.values()],
    )
)

"""Classification heads: what turns a shared encoder's output into one logit per class."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from searchmerge.errors import SpecError

Pooling = Literal["mean", "cls", "max", "pooler"]
"""How the states of all tokens become one vector: their mean or maximum over the tokens that are
not padding, the first token's, or what the encoder itself calls its pooled output."""


@dataclass(frozen=True)
class ModelHead:
    """The head of a classifier of transformers: parameters put into its place for one call.

    Attributes:
        parameters: Name in the resident model to tensor; none where the head is merged too.
        n_classes: How many logits it gives.
    """

    parameters: Mapping[str, Tensor]
    n_classes: int
    _placed: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = field(
        default_factory=dict, repr=False
    )

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return ``(n_examples, n_classes)``."""
        placed = _placed(self._placed, self.parameters, model)
        outputs = torch.func.functional_call(model, placed, kwargs=dict(inputs))
        logits: Tensor = outputs.logits
        return logits


@dataclass(frozen=True)
class PooledHead:
    """A linear layer on the pooled output of an encoder.

    Attributes:
        pooling: How the encoder's output becomes one vector.
        parameters: ``weight``, ``(n_classes, size)``, and ``bias``, ``(n_classes,)``.
    """

    pooling: Pooling
    parameters: Mapping[str, Tensor]
    _placed: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = field(
        default_factory=dict, repr=False
    )

    @property
    def n_classes(self) -> int:
        """How many logits it gives."""
        return len(self.parameters["weight"])

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return ``(n_examples, n_classes)``."""
        placed = _placed(self._placed, self.parameters, model)
        pooled = pool(model(**inputs), inputs.get("attention_mask"), self.pooling)
        return functional.linear(pooled, placed["weight"], placed["bias"])


Head = ModelHead | PooledHead


@dataclass(frozen=True)
class HeadUse:
    """How tasks use an expert's head.

    Attributes:
        pooling: How the output is pooled that the head, a linear layer, is applied to;
            ``None`` where the head is the model class's own.
        labels: The names of its classes; none where no task names them.
    """

    pooling: Pooling | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpertHead:
    """An expert's own head, and what its classes are called.

    Attributes:
        head: Gives one logit per class.
        labels: The name of each class, in the order of the logits; none where the expert's
            configuration does not name as many.
    """

    head: Head
    labels: tuple[str, ...] = ()


class PooledClassifier(nn.Module):
    """An encoder with a linear head, called as a classifier of transformers is.

    Args:
        encoder: A model of transformers.
        head: What gives the logits.
        labels: The name of each class.
    """

    def __init__(self, encoder: nn.Module, head: PooledHead, labels: Sequence[str]) -> None:
        super().__init__()
        config: Any = deepcopy(encoder.config)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        self.config = config
        self.encoder = encoder
        self.classifier = nn.Linear(*head.parameters["weight"].T.shape)
        self.classifier.load_state_dict(dict(head.parameters))
        like = next(p for p in encoder.parameters() if p.is_floating_point())
        self.classifier.to(like.device, like.dtype)
        self.pooling = head.pooling

    def forward(self, **inputs: Any) -> Any:
        """Return an output of transformers with ``logits``, ``(n_examples, n_classes)``."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        pooled = pool(self.encoder(**inputs), inputs.get("attention_mask"), self.pooling)
        return SequenceClassifierOutput(logits=self.classifier(pooled))


def _placed(
    cache: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]],
    parameters: Mapping[str, Tensor],
    model: nn.Module,
) -> dict[str, Tensor]:
    """Return the parameters on the model's device and in its dtype, copied once."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    key = (like.device, like.dtype)
    if key not in cache:
        cache[key] = {name: t.to(like.device, like.dtype) for name, t in parameters.items()}
    return cache[key]


def pool(outputs: Any, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Return one vector per example, ``(n_examples, size)``.

    Args:
        outputs: What an encoder of transformers returned.
        mask: 1 for each token that counts, ``(n_examples, n_tokens)``; ``None`` counts all.
        pooling: How they become one vector.
    """
    if pooling == "pooler":
        pooled: Tensor = outputs.pooler_output
        return pooled
    states: Tensor = outputs.last_hidden_state
    if pooling == "cls":
        return states[:, 0]
    if mask is None:
        return states.mean(1) if pooling == "mean" else states.amax(1)
    if pooling == "max":
        return states.masked_fill(mask[..., None] == 0, torch.finfo(states.dtype).min).amax(1)
    counted = mask[..., None].float()
    mean = (states.float() * counted).sum(1) / counted.sum(1)
    return mean.to(states.dtype)


def model_head(
    tensors: Mapping[str, Tensor], needed: Mapping[str, str], n_classes: int, where: str
) -> ModelHead:
    """Return an expert's head for a classifier of transformers.

    Args:
        tensors: The expert's own tensors by their names in its checkpoint.
        needed: Name in a checkpoint to name in the model, of what the head is made of.
        n_classes: How many classes the model itself has, for a head that is merged.
        where: Whose head it is, for messages.

    Raises:
        SpecError: If a tensor is missing.
    """
    _check_finite(tensors, where)
    for name in needed:
        if name not in tensors:
            private = ", ".join(tensors) or "none"
            raise SpecError(
                f"{where} has no tensor {name!r} for its classification head (its private "
                f"tensors: {private}); save it with its head, or set classification.pooling"
            )
    parameters = {needed[name]: tensors[name] for name in needed}
    return ModelHead(parameters, n_logits(tensors, needed) if needed else n_classes)


def n_logits(tensors: Mapping[str, Tensor], needed: Iterable[str]) -> int:
    """Return how many classes a head has: as many as its last tensor has rows or entries.

    Args:
        tensors: The head's tensors by name.
        needed: Their names in the order of the model; none of a single linear layer.
    """
    *_, last = [tensors[name] for name in needed] or tensors.values()
    return len(last)


def pooled_head(tensors: Mapping[str, Tensor], pooling: Pooling, where: str) -> PooledHead:
    """Return an expert's linear head, whatever its two tensors are called.

    Raises:
        SpecError: If the tensors are not a weight and a bias, or a weight alone.
    """
    _check_finite(tensors, where)
    weights = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    biases = [tensor for tensor in tensors.values() if tensor.ndim == 1]
    fits = len(weights) == 1 and len(weights) + len(biases) == len(tensors)
    if not fits or len(biases) > 1 or (biases and len(biases[0]) != len(weights[0])):
        private = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items()) or "none"
        raise SpecError(
            f"{where} needs a linear classification head: one private tensor [classes, size] "
            f"and one [classes] (its private tensors: {private})"
        )
    bias = biases[0] if biases else weights[0].new_zeros(len(weights[0]))
    return PooledHead(pooling, {"weight": weights[0], "bias": bias})


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise SpecError(f"{where}: tensor {name!r} holds NaN or inf; all must be finite")

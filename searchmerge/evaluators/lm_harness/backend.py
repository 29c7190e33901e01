"""What runs the model for lm-eval's requests: transformers here, other engines beside it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from searchmerge.evaluators.causal.documents import Tokens
from searchmerge.evaluators.causal.generation import GenerationOptions, Generator
from searchmerge.evaluators.causal.model import device_of
from searchmerge.evaluators.causal.scoring import CausalScorer
from searchmerge.evaluators.causal.tuning import GpuProbe, Way, fastest


class Backend(Protocol):
    """Runs the model: scores continuations, and generates them.

    Attributes:
        spare: Tokens of the model's window that it cannot use for a prompt.
    """

    spare: int

    @property
    def reads(self) -> Literal["causal", "seq2seq"]:
        """Return the kind of model, as lm-eval calls it."""
        ...

    def score(
        self, model: nn.Module, pairs: Sequence[tuple[Tokens, Tokens]], max_length: int
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether it is the greedy one."""
        ...

    def log_likelihoods(
        self, model: nn.Module, pairs: Sequence[tuple[Tokens, Tokens]], max_length: int
    ) -> Tensor:
        """Return each continuation's log-likelihood, ``(n_pairs,)``, with its gradient."""
        ...

    def log_probabilities(
        self, model: nn.Module, pairs: Sequence[tuple[Tokens, Tokens]], max_length: int
    ) -> list[Tensor]:
        """Return what comes next at every token of each continuation, with its gradient.

        Returns:
            Each continuation's log-probabilities, ``(n_tokens, vocabulary)`` float32.
        """
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

    def tune(
        self, model: nn.Module, score: Callable[[], object], *, may_grow: bool
    ) -> dict[Way, float]:
        """Return the seconds that scoring takes in each way that was tried, the best first.

        There is none where nothing is measured.
        """
        ...

    def use(self, way: Way) -> None:
        """Score in a way from now on."""
        ...

    def follow(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights that a merge has left in the model, by checkpoint names."""
        ...


class TransformersBackend:
    """Runs the resident model itself, which is a causal language model.

    Args:
        batch_tokens: Tokens of one forward pass, 1 or more.
    """

    reads: Literal["causal"] = "causal"
    spare = 0

    def __init__(self, batch_tokens: int) -> None:
        scorer = self._scorer = CausalScorer(batch_tokens)
        self.score = scorer.score
        self.log_likelihoods = scorer.log_likelihoods
        self.log_probabilities = scorer.log_probabilities
        self.generate = Generator(batch_tokens).generate

    def tune(
        self, model: nn.Module, score: Callable[[], object], *, may_grow: bool
    ) -> dict[Way, float]:
        """Return the seconds that scoring takes in each way that was tried, the best first.

        Nothing is measured on a CPU, where the rule is no slower.
        """
        device = device_of(model)
        if device.type != "cuda":
            return {}

        def run(way: Way) -> None:
            self.use(way)
            score()

        try:
            return fastest(run, GpuProbe(device), may_grow=may_grow)
        finally:
            self.use(Way())

    def use(self, way: Way) -> None:
        """Score in a way from now on."""
        self._scorer.way = way

    def follow(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Do nothing: the weights are those of the model that is run."""

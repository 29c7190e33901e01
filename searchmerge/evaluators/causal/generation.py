"""Batched generation with a language model: prompts padded on the left, stop sequences.

Greedy decoding, which is what nearly every task asks for, is a loop of our own over public API
(``decoding``): what all prompts begin with is run once, and rows leave the batch as they finish.
Whatever else a task or the model's generation config asks for goes through ``model.generate``, as
does a model that does not honour masks and positions. So do encoder-decoders, of which prompts of
one length are continued together: as in lm-eval, they may say as much more as the prompt is long.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from searchmerge.evaluators.causal.decoding import Decoder, padded
from searchmerge.evaluators.causal.documents import Tokens
from searchmerge.evaluators.causal.fitting import Fitting
from searchmerge.evaluators.causal.model import device_of, encodes, run_prefix
from searchmerge.evaluators.causal.sampling import Draws, setting, warpers
from searchmerge.evaluators.causal.scoring import honours_packing, packed_window
from searchmerge.evaluators.causal.stopping import NonFiniteLogits, StopSequences

_MAX_ROWS = {"cpu": 64, "cuda": 256}
"""Prompts that are generated together at most, by kind of device: on a CPU more would hardly be
faster; on a GPU a step reads all weights, for few rows or many."""

_CACHE_FACTOR = {"cpu": 32, "cuda": 16}
"""Tokens of a batch's key-value cache, per token of a scoring batch, by kind of device."""

_SHARED_TOKENS = 64
"""What all prompts begin with is run once if that saves as many tokens: it is a pass more."""

_HARMLESS = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k"),
        *("top_p", "min_p", "max_length", "max_new_tokens", "use_cache", "transformers_version"),
    }
)
"""Entries of a generation config, other than its defaults, that greedy decoding does not heed or
that the loop here heeds too."""


@dataclass(frozen=True)
class GenerationOptions:
    """How the prompts of one call are continued.

    Attributes:
        stop: Text at which a continuation ends.
        max_new_tokens: Tokens that are generated at most, 1 or more.
        arguments: Further arguments of ``model.generate``.
        seeds: Of each prompt, where its tokens are drawn at random.
    """

    stop: tuple[str, ...]
    max_new_tokens: int
    arguments: dict[str, Any]
    seeds: tuple[int, ...] = ()


class _Finite:
    """A logits processor that refuses logits that are not finite."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = torch.isfinite(scores.amax(-1))
        if not finite.all():
            first = int((~finite).nonzero()[0, 0])
            raise NonFiniteLogits(self._rows[first * len(self._rows) // len(finite)])
        return scores


class Generator:
    """Generates with whatever weights a model holds now.

    Args:
        batch_tokens: Tokens of a batch of prompts, padding included, 1 or more. Where a batch
            does not fit into memory, fewer prompts are continued at once.
    """

    def __init__(self, batch_tokens: int) -> None:
        self._batch_tokens = batch_tokens
        self._fitting = Fitting()
        self._decoder = Decoder()
        self._honours: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    @torch.no_grad()
    def generate(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Tokens],
        options: GenerationOptions,
    ) -> list[list[int]]:
        """Return the new tokens of every prompt; what follows a stop sequence is of no meaning.

        Where the options ask for sampling, the same weights, prompt and seed give the same
        tokens, whatever is continued beside it; the global random state is left as it was.

        Args:
            model: A model of transformers that generates.
            tokenizer: Its tokenizer, with a padding token.
            prompts: Token ids, one or more each.
            options: How to continue.

        Raises:
            NonFiniteLogits: If the logits of a prompt are not finite.
        """
        longest = max(map(len, prompts), default=0) + options.max_new_tokens
        is_plain = not encodes(model) and is_greedy(model, options)
        greedy = is_plain and self._takes_masks(model, longest)
        generate = self._generate_greedily if greedy else _generate_through_model

        def run(part: float) -> list[list[int]]:
            kind = device_of(model).type
            batches = self._batches(prompts, options, part, kind)
            if encodes(model):
                batches = [rows for batch in batches for rows in _of_one_length(prompts, batch)]
            return generate(model, tokenizer, prompts, options, batches)

        return self._fitting.run(run)

    def _generate_greedily(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Tokens],
        options: GenerationOptions,
        batches: Sequence[Sequence[int]],
    ) -> list[list[int]]:
        """Return the new tokens of every prompt, by the loop of our own."""
        results: list[list[int]] = [[]] * len(prompts)
        n_shared = _n_shared(prompts)
        prefix = run_prefix(model, prompts[0][:n_shared])
        stops = StopSequences(tokenizer, options.stop, 0)
        for rows in batches:
            batch = {i: prompts[i][n_shared:] for i in rows}
            new = self._decoder.decode(model, batch, prefix, stops, options.max_new_tokens)
            for i, tokens in zip(rows, new, strict=True):
                results[i] = tokens
        return results

    def _batches(
        self, prompts: Sequence[Tokens], options: GenerationOptions, part: float, kind: str
    ) -> list[list[int]]:
        """Return which prompts are generated together: those of about one length.

        Args:
            prompts: What to continue.
            options: How far.
            part: Of a usual batch's prompts that are continued at once, in (0, 1].
            kind: Of device.
        """
        kind = kind if kind in _MAX_ROWS else "cpu"
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        batches = []
        while order:
            longest = len(prompts[order[0]]) + options.max_new_tokens
            n_usual = min(_MAX_ROWS[kind], _CACHE_FACTOR[kind] * self._batch_tokens // longest)
            n_rows = max(1, int(part * n_usual))
            batches.append(order[:n_rows])
            order = order[n_rows:]
        return batches

    def _takes_masks(self, model: nn.Module, longest: int) -> bool:
        """Return whether a mask and positions say all that the model knows of its past."""
        if packed_window(model, longest) < longest:
            return False
        if model not in self._honours:
            verdict = honours_packing(model)
            if verdict is None:  # these weights hide it
                return False
            self._honours[model] = verdict
        return self._honours[model]


def _generate_through_model(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Tokens],
    options: GenerationOptions,
    batches: Sequence[Sequence[int]],
) -> list[list[int]]:
    """Return the new tokens of every prompt, by ``model.generate``."""
    samples = bool(setting(model, options.arguments, "do_sample"))
    draws_beams = samples and _n_beams(model, options) > 1
    if draws_beams:  # they are drawn from a global state, of which each prompt has its own
        batches = [[row] for rows in batches for row in rows]
    results: list[list[int]] = [[]] * len(prompts)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        for rows in batches:
            if draws_beams:
                torch.manual_seed(options.seeds[rows[0]])
            seeds = [options.seeds[row] for row in rows] if samples else []
            batch = {row: prompts[row] for row in rows}
            new = _generate_batch(model, tokenizer, batch, replace(options, seeds=tuple(seeds)))
            for i, tokens in zip(rows, new, strict=True):
                results[i] = tokens
    return results


def _n_beams(model: nn.Module, options: GenerationOptions) -> int:
    return int(setting(model, options.arguments, "num_beams") or 1)


def is_greedy(model: Any, options: GenerationOptions) -> bool:
    """Return whether the likeliest token is all that options and generation config ask for."""
    asked = {key: value for key, value in options.arguments.items() if value is not None}
    if asked.pop("do_sample", None) or asked.pop("num_beams", 1) != 1 or asked:
        return False
    config = getattr(model, "generation_config", None)
    if config is None:
        return False
    said = {key for key, value in config.to_diff_dict().items() if value not in (None, False)}
    return said - {"_from_model_config"} <= _HARMLESS


def _of_one_length(prompts: Sequence[Tokens], rows: Sequence[int]) -> list[list[int]]:
    """Return those of some prompts that are equally long, together; they are in that order."""
    return [list(its) for _, its in groupby(rows, key=lambda row: len(prompts[row]))]


def _n_shared(prompts: Sequence[Tokens]) -> int:
    """Return how many tokens are run once for all prompts; every prompt keeps one or more."""
    if len(prompts) < 2:
        return 0
    common = min(len(prompt) - 1 for prompt in prompts)
    first, last = min(prompts), max(prompts)
    while first[:common] != last[:common]:
        common -= 1
    return common if common * (len(prompts) - 1) >= _SHARED_TOKENS else 0


def _generate_batch(
    model: Any, tokenizer: Any, prompts: Mapping[int, Tokens], options: GenerationOptions
) -> list[list[int]]:
    """Return the new tokens of each prompt; they are drawn where there are seeds."""
    tokens, mask = padded(list(prompts.values()), tokenizer.pad_token_id)
    width, device = tokens.shape[1], device_of(model)
    longest = width + options.max_new_tokens
    if encodes(model):  # the decoder begins with a token of its own
        longest = min(longest, getattr(model.config, "max_position_embeddings", None) or longest)
        width = 1
    arguments = {"max_length": longest} | options.arguments
    processors: list[Any] = [_Finite(list(prompts))]
    if options.seeds and _n_beams(model, options) == 1:
        warped = warpers(model, options.arguments, device)
        processors.append(Draws(warped, options.seeds, width, arguments["max_length"] - width))
    sequences: Tensor = model.generate(
        input_ids=tokens.to(device),
        attention_mask=mask.to(device),
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[StopSequences(tokenizer, options.stop, width)],
        logits_processor=processors,
        use_cache=True,
        **arguments,
    )
    return sequences[:, width:].tolist()

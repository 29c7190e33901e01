"""The resident model as lm-eval sees a language model."""

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from searchmerge.errors import SpecError
from searchmerge.evaluators.causal.documents import Tokens
from searchmerge.evaluators.causal.generation import GenerationOptions
from searchmerge.evaluators.causal.stopping import NonFiniteLogits
from searchmerge.evaluators.lm_harness.backend import Backend
from searchmerge.evaluators.lm_harness.generating import (
    by_options,
    options_of,
    room_for_prompt,
    seeds_of,
)
from searchmerge.evaluators.tokenizer import load_tokenizer

_logger = logging.getLogger(__name__)


class ResidentLM:
    """What lm-eval asks of a language model, answered by whatever ``model`` is now.

    ``make_lm`` makes an ``lm_eval.api.model.TemplateLM`` of it.

    Attributes:
        model: The resident model; set before the first request.
    """

    model: nn.Module

    def __init__(
        self,
        tokenizer: Any,
        *,
        runs: Backend,
        max_length: int | None,
        add_bos_token: bool | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._runs = runs
        self._max_length = max_length
        self._add_bos_token = add_bos_token
        self._seed = seed
        self._warned = False
        # The choices of a question follow one another and share its text.
        self._encode = lru_cache(maxsize=16)(self._tokenize)
        self._pairs: dict[tuple[str, str], tuple[Tokens, Tokens]] = {}
        self._windows: dict[tuple[str, int], list[tuple[Tokens, Tokens]]] = {}

    @property
    def backend(self) -> str:
        """Return the kind of model, by which lm-eval encodes a context and its continuation."""
        return self._runs.reads

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
        return self._window(self.model.config)

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        return next(self.model.parameters()).device

    @property
    def tokenizer_name(self) -> str:
        """Return the tokenizer's name, which lm-eval asks for with chat templates."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,  # noqa: FBT001, FBT002 - lm-eval's signature
        *,
        template: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt of a conversation.

        A template that refuses a system's turn is given the others alone, as lm-eval does.

        Args:
            chat_history: The turns, each with ``role`` and ``content``.
            add_generation_prompt: Whether the assistant's turn begins; else the last turn goes on.
            template: Text of the template; the tokenizer's own if ``None``.
            arguments: What else the template is given.
        """
        from jinja2 import TemplateError

        options = {
            "chat_template": template,
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **(arguments or {}),
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **options))
        except TemplateError:
            others = [turn for turn in chat_history if turn["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            if not self._warned:
                _logger.warning("the chat template refuses a system's turn, which is left out")
                self._warned = True
            return str(self.tokenizer.apply_chat_template(others, **options))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:  # noqa: FBT001
        """Return the token ids of a text; one that begins with the prefix token gets no other."""
        return list(self._encode(string, add_special_tokens))

    def as_read(self, text: str) -> str:
        """Return a prompt as the model reads it, special tokens as text."""
        return str(self.tokenizer.decode(self.tok_encode(text), skip_special_tokens=False))

    def _tokenize(self, text: str, add_special_tokens: bool | None) -> Tokens:  # noqa: FBT001
        if add_special_tokens is None and text.startswith(self._prefix_text):
            add_special_tokens = False
        elif add_special_tokens is None:
            add_special_tokens = self._add_bos_token
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

    def log_likelihoods(self, texts: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Return each continuation's log-likelihood, with its gradient, and its tokens' number.

        Args:
            texts: Context and continuation, one or more.

        Returns:
            Two tensors, ``(n_texts,)`` float32.
        """
        return self._differentiated([[self._pair(*text)] for text in texts])

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the same of whole texts."""
        return self._differentiated([self._text_windows(text) for text in texts])

    def next_tokens(self, texts: Sequence[tuple[str, str]]) -> list[Tensor]:
        """Return what comes next at every token of each continuation, with its gradient.

        Args:
            texts: Context and continuation, one or more; of an empty continuation it is what
                comes first.

        Returns:
            Log-probabilities of each, ``(n_tokens, vocabulary)`` float32.
        """
        pairs = [self._pair(*text) if text[1] else self._open(text[0]) for text in texts]
        return self._runs.log_probabilities(self.model, pairs, self.max_length)

    def next_tokens_of_texts(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the same of whole texts, each read in windows."""
        windows = [self._text_windows(text) for text in texts]
        pairs = [pair for of_text in windows for pair in of_text]
        given = iter(self._runs.log_probabilities(self.model, pairs, self.max_length))
        return [torch.cat([next(given) for _ in of_text]) for of_text in windows]

    def _open(self, context: str) -> tuple[Tokens, Tokens]:
        """Return a prompt, and a token after it that stands for any."""
        return self._read(context) or (self.prefix_token_id,), (self.eot_token_id,)

    def _read(self, text: str) -> Tokens:
        """Return the tokens of a prompt as this kind of model reads it."""
        is_causal = self._runs.reads == "causal"
        return tuple(self.tok_encode(text) if is_causal else self.tokenizer.encode(text))

    def _differentiated(
        self, texts: Sequence[Sequence[tuple[Tokens, Tokens]]]
    ) -> tuple[Tensor, Tensor]:
        """Return each text's log-likelihood over its windows, and how many tokens that is of."""
        pairs = [pair for windows in texts for pair in windows]
        likelihoods = self._runs.log_likelihoods(self.model, pairs, self.max_length)
        parts = torch.split(likelihoods, [len(windows) for windows in texts])
        n_tokens = [sum(len(tokens) for _, tokens in windows) for windows in texts]
        return torch.stack([part.sum() for part in parts]), likelihoods.new_tensor(n_tokens)

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

    def n_tokens(self, context: str, continuation: str) -> int:
        """Return how many tokens a continuation has, which may be none where texts merge."""
        return len(self._encode_request(context, continuation)[1])

    def fits(self, text: str, config: Any) -> bool:
        """Return whether a text has tokens, and no more than a model can be asked for.

        Args:
            text: Any text.
            config: The model's configuration; without one any number will do.
        """
        n_tokens = self.n_tokens("", text)
        return n_tokens > 0 and (config is None or n_tokens <= self._window(config))

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
        """Return each prompt's continuation, up to the first of its stop sequences.

        What is drawn at random depends on the seed, the request's task, example and number, and
        how often the same request stands before: it is answered several times where a task says
        so.
        """
        from lm_eval.models.utils import postprocess_generated_text

        seeds = seeds_of(requests, self._seed)
        texts = [""] * len(requests)
        for options, members in by_options(requests, self.tokenizer):
            prompts = [self._prompt(requests[i].args[0], options) for i in members]
            options = replace(options, seeds=tuple(seeds[i] for i in members))
            try:
                answers = self._runs.generate(self.model, self.tokenizer, prompts, options)
            except NonFiniteLogits as error:
                raise NonFiniteLogits(members[error.row]) from error
            for i, tokens in zip(members, answers, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                texts[i] = postprocess_generated_text(text, list(options.stop), None)
        return texts

    def _prompt(self, text: str, options: GenerationOptions) -> Tokens:
        """Return the tokens of a prompt: its last, for which there is room."""
        is_causal = self._runs.reads == "causal"
        whole = self.max_length
        room = room_for_prompt(options.max_new_tokens, whole) if is_causal else whole
        return self._read(text)[-room:] or (self.prefix_token_id,)

    def check_generation(self, arguments: Mapping[str, Any], config: Any) -> None:
        """Check, before there is a model, that what is to be generated fits its window.

        Args:
            arguments: Of a task's generation.
            config: The model's configuration.

        Raises:
            SpecError: If not.
        """
        if self._runs.reads == "causal":
            options = options_of(arguments, self.tokenizer)
            room_for_prompt(options.max_new_tokens, self._window(config))

    def _window(self, config: Any) -> int:
        from lm_eval.models.utils import resolve_max_length

        whole = self._max_length or int(resolve_max_length(config, self.tokenizer))
        return whole - self._runs.spare


def make_lm(
    tokenizer: Any,
    backend: Backend,
    *,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
    seed: int = 0,
) -> Any:
    """Return a ``ResidentLM`` that is an ``lm_eval.api.model.LM``.

    Args:
        tokenizer: A tokenizer, or what ``AutoTokenizer.from_pretrained`` takes.
        backend: What runs the model.
        max_length: Window in tokens; the model's own if ``None``.
        add_bos_token: Whether prompts begin with the token that begins a text; as the tokenizer
            does it if ``None``.
        seed: Of answers that are drawn at random.
    """
    from lm_eval.api.model import TemplateLM

    class ResidentTemplateLM(ResidentLM, TemplateLM):  # type: ignore[misc]
        """Our answers under lm-eval's type."""

    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer, add_bos_token=add_bos_token)
    if tokenizer.pad_token_id is None:
        tokenizer = copy(tokenizer)
        tokenizer.pad_token_id = tokenizer.unk_token_id or tokenizer.eos_token_id
    return ResidentTemplateLM(
        tokenizer,
        runs=backend,
        max_length=max_length,
        add_bos_token=add_bos_token,
        seed=seed,
    )

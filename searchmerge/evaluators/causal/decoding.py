"""Greedy decoding of a batch of prompts: every step, each row's likeliest token.

On a CPU the cache of keys and values grows with every step, and rows that are done leave it. On
a GPU a step of a small model runs for less time than its hundreds of kernels take to launch. So
the cache has its full length from the first step on, a step is recorded once, as a CUDA graph,
and replayed; nothing waits for the device: chosen tokens come to the host some steps late, and
what a row says after its end is cut. Rows leave when so few are left that it pays to record anew.
A model whose step cannot be recorded is decoded as on a CPU.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from searchmerge.evaluators.causal.documents import Tokens
from searchmerge.evaluators.causal.model import Prefix, device_of, dtype_of, sent, takes

_logger = logging.getLogger(__name__)

_LEAVE = 0.9
"""Rows that are done leave a cache that grows when this part of them is left, or less: each time
it is copied."""

_LEAVE_RECORDED = 0.5
"""Rows that are done leave a recorded step when this part of them is left, or less."""

_RECORD_FROM = 12
"""Steps from which recording pays, which takes about as long as three of them."""

_CHUNK = 4
"""Recorded steps whose tokens are fetched together."""

_AHEAD = 2
"""Chunks that are under way on the device while the host looks at the one before them."""

_WIDTH = 64
"""Columns of a static cache come in multiples of this, for which attention has fast kernels."""

_NOT_FINITE = -1
"""Stands for a token where the logits are not finite."""

Step = Callable[[], None]
Recorder = Callable[[Step], Step]


class NonFiniteLogits(Exception):
    """The model gave a NaN or an infinity where the next token is chosen.

    Attributes:
        row: Index of the prompt.
    """

    def __init__(self, row: int) -> None:
        super().__init__(f"logits of prompt {row} are not finite")
        self.row = row


class StopSequences:
    """A stopping criterion: a row is done once its new text holds a stop sequence.

    The last tokens of every row are decoded after every step: as many as the longest sequence
    has, and two more, since a model may spell it in other tokens than the tokenizer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in self._stop]
        self._look_back = max(lengths, default=0) + 2
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return for each row whether it is done: what ``model.generate`` asks."""
        new = input_ids[:, max(self._prompt_tokens, input_ids.shape[1] - self._look_back) :]
        return torch.tensor([self.met(row) for row in new.tolist()], device=input_ids.device)

    def met(self, tokens: Sequence[int]) -> bool:
        """Return whether the last of these new tokens hold a stop sequence."""
        if not self._stop:
            return False
        text = self._tokenizer.decode(tokens[-self._look_back :])
        return any(stop in text for stop in self._stop)


class Said:
    """What the rows of a batch have said so far.

    Args:
        prompts: Index of each row's prompt, for messages.
        ends: Tokens that end a row.
        stops: Text that ends a row.

    Attributes:
        tokens: Of each row, its end included and nothing after it.
    """

    def __init__(self, prompts: Sequence[int], ends: Iterable[int], stops: StopSequences) -> None:
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self._prompts = prompts
        self._ends = frozenset(ends)
        self._stops = stops
        self._done: set[int] = set()

    def add(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Add a step's token to each of some rows, unless the row is done.

        Raises:
            NonFiniteLogits: If a token could not be chosen.
        """
        for row, token in zip(rows, tokens, strict=True):
            if row in self._done:
                continue
            if token == _NOT_FINITE:
                raise NonFiniteLogits(self._prompts[row])
            self.tokens[row].append(token)
            if token in self._ends or self._stops.met(self.tokens[row]):
                self._done.add(row)

    def left(self, rows: Sequence[int]) -> list[int]:
        """Return the places of the rows that are not done."""
        return [place for place, row in enumerate(rows) if row not in self._done]


@dataclass
class _Begun:
    """Rows that have been run up to their next token.

    Attributes:
        tokens: The next token of each, ``(n_rows, 1)``.
        positions: Its position, ``(n_rows, 1)``.
        mask: 1 where a row may look, 0 where it is padding, ``(n_rows, n_past)``.
        past: Keys and values of each layer; ``None`` for a layer that uses those of another.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    past: list[tuple[Tensor, Tensor] | None]


class Decoder:
    """Decodes batches of prompts.

    Args:
        recorder: Returns what records a model's steps; ``None`` where its steps are launched one
            by one.
    """

    def __init__(self, recorder: Callable[[nn.Module], Recorder | None] | None = None) -> None:
        self._recorder = recorder or graphs_of
        self._refused: WeakSet[nn.Module] = WeakSet()

    def decode(
        self,
        model: nn.Module,
        prompts: Mapping[int, Tokens],
        prefix: Prefix,
        ending: tuple[Any, StopSequences],
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Return the new tokens of every prompt, an end token included.

        Args:
            model: What gives the logits.
            prompts: Index of each prompt, and its tokens after the prefix that all share.
            prefix: What stands before the prompts; may be empty.
            ending: The model's tokenizer, and the text that ends a row.
            max_new_tokens: Tokens of a row at most, 1 or more.

        Raises:
            NonFiniteLogits: If the logits of a prompt are not finite.
        """
        batch = _Batch(model, prompts, prefix, ending, max_new_tokens)
        record = None if model in self._refused else self._recorder(model)
        if record is None or max_new_tokens <= _RECORD_FROM:
            return batch.decode_growing()
        try:
            return batch.decode_recorded(record)
        except _NotRecordedError as error:
            self._refused.add(model)
            _logger.warning(
                "a step of %s cannot be recorded, so that generating takes longer: %s",
                type(model).__name__,
                " ".join(str(error).split())[:200],
            )
        return batch.decode_growing()


class _NotRecordedError(Exception):
    """A step cannot be recorded; the message says why."""


def graphs_of(model: nn.Module) -> Recorder | None:
    """Return what records steps as CUDA graphs, where a model is on one GPU."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or not all(device.type == "cuda" for device in devices):
        return None
    device = devices.pop()

    def record(step: Step) -> Step:
        current = torch.cuda.current_stream(device)
        side = _side_stream(device)
        # What fails while it is recorded leaves its stream current: the outer block does not.
        with torch.cuda.device(device), torch.cuda.stream(current):
            side.wait_stream(current)
            with torch.cuda.stream(side):
                step()  # libraries get ready, which they cannot while a graph is recorded
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                step()
        return graph.replay

    return record


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which steps are recorded: for each, libraries keep memory."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Batch:
    """Prompts that are decoded together; for the arguments see ``Decoder.decode``."""

    def __init__(
        self,
        model: Any,
        prompts: Mapping[int, Tokens],
        prefix: Prefix,
        ending: tuple[Any, StopSequences],
        max_new_tokens: int,
    ) -> None:
        tokenizer, self._stops = ending
        self._model = model
        self._prompts = list(prompts)
        self._prefix = prefix
        self._tokens, self._mask = padded(list(prompts.values()), tokenizer.pad_token_id)
        self._n_steps = max_new_tokens
        end = model.generation_config.eos_token_id
        self._ends = {*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id}

    def decode_growing(self) -> list[list[int]]:
        """Return the new tokens of every row; a step is looked at before the next one begins."""
        said, rows = self._nothing_said(), list(range(len(self._prompts)))
        cache = self._prefix.rows(len(rows))
        inputs, mask, positions = self._inputs()
        for _ in range(self._n_steps):
            logits = _forward(
                self._model,
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
            )
            chosen, told = _choice(logits)
            said.add(rows, told.tolist())
            left = said.left(rows)
            if not left:
                break
            inputs, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            if len(left) <= _LEAVE * len(rows):
                kept = torch.tensor(left)  # on the CPU: a model's layers may lie on many devices
                cache.batch_select_indices(kept)
                inputs, positions, mask = inputs[kept], positions[kept], mask[kept]
                rows = [rows[place] for place in left]
        return said.tokens

    def decode_recorded(self, record: Recorder) -> list[list[int]]:
        """Return the new tokens of every row; the host looks at steps that are some steps past.

        Raises:
            _NotRecordedError: If a step cannot be recorded.
        """
        said, rows = self._nothing_said(), list(range(len(self._prompts)))
        begun, told = self._begin()
        said.add(rows, told.tolist())
        n_steps = self._n_steps - 1
        while n_steps and (left := said.left(rows)):
            if len(left) < len(rows):
                begun = _kept(begun, torch.tensor(left))
                rows = [rows[place] for place in left]
            steps = _Steps(self._model, begun, n_steps)
            del begun  # before the next cache is made
            n_done = _run(steps, _recorded(steps.step, record), (said, rows))
            begun, n_steps = steps.begun(n_done), n_steps - n_done
        return said.tokens

    def _nothing_said(self) -> Said:
        return Said(self._prompts, self._ends, self._stops)

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens of the first pass, the mask and their positions."""
        device, n_past = device_of(self._model), self._prefix.n_tokens
        mask = torch.cat([self._mask.new_ones(len(self._mask), n_past), self._mask], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, n_past:]
        return sent(self._tokens, device), sent(mask, device), sent(positions, device)

    def _begin(self) -> tuple[_Begun, Tensor]:
        """Run the prompts; return what the next step needs, and what has been chosen."""
        cache = self._prefix.rows(len(self._prompts))
        inputs, mask, positions = self._inputs()
        logits = _forward(
            self._model,
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
        )
        chosen, told = _choice(logits)
        past = [
            None if layer.keys is None else (layer.keys, layer.values) for layer in cache.layers
        ]
        return _Begun(chosen[:, None], positions[:, -1:] + 1, mask, past), told


class _Steps:
    """A step of some rows, on tensors that stay where they are.

    Args:
        model: What gives the logits.
        begun: The rows.
        n_steps: Steps for which there is room, 1 or more.

    Attributes:
        told: What was chosen in each step, ``(n_steps, n_rows)``.
    """

    def __init__(self, model: Any, begun: _Begun, n_steps: int) -> None:
        n_rows, self._n_past = begun.mask.shape
        width = -(-(self._n_past + n_steps) // _WIDTH) * _WIDTH
        dtype = dtype_of(model)
        self._model = model
        self._tokens, self._positions = begun.tokens.clone(), begun.positions.clone()
        hidden = begun.tokens.new_full((n_rows, 1, 1, width), torch.finfo(dtype).min, dtype=dtype)
        hidden[:, 0, 0, : self._n_past].masked_fill_(begun.mask > 0, 0)
        self._hidden = hidden
        self._column = begun.tokens.new_full((1,), self._n_past)
        self._step = begun.tokens.new_zeros(1)
        self._cache = _static_cache(begun.past, width)
        self.told = begun.tokens.new_zeros(n_steps, n_rows)

    def step(self) -> None:
        """Run every row's next token; nothing is returned, and nothing waits."""
        self._hidden.index_fill_(3, self._column, 0)
        logits = _forward(
            self._model,
            input_ids=self._tokens,
            attention_mask=self._hidden,
            position_ids=self._positions,
            past_key_values=self._cache,
        )
        chosen, told = _choice(logits)
        self.told.index_copy_(0, self._step, told[None])
        self._tokens.copy_(chosen[:, None])
        for counter in (self._positions, self._column, self._step):
            counter.add_(1)

    def begun(self, n_done: int) -> _Begun:
        """Return the rows after some steps."""
        n_past = self._n_past + n_done
        past = [
            (layer.keys[:, :, :n_past], layer.values[:, :, :n_past])
            if layer.is_initialized
            else None
            for layer in self._cache.layers
        ]
        mask = (self._hidden[:, 0, 0, :n_past] == 0).long()
        return _Begun(self._tokens, self._positions, mask, past)


Fetch = Callable[[], list[list[int]]]


def _run(steps: _Steps, replay: Step, saying: tuple[Said, Sequence[int]]) -> int:
    """Replay steps, of which one has been run, until all rows are done or many; return how many.

    Args:
        steps: What is replayed.
        replay: Runs one more step.
        saying: Takes what was chosen, and the rows that it was chosen for.
    """
    (said, rows), n_steps, n_run = saying, len(steps.told), 1
    waiting: deque[Fetch] = deque([_fetched(steps.told[:1])])
    while True:
        _hear(waiting, 0 if n_run == n_steps else _AHEAD, saying)
        n_left = len(said.left(rows))
        is_worth_it = n_steps - n_run > _RECORD_FROM and n_left <= _LEAVE_RECORDED * len(rows)
        if n_run == n_steps or not n_left or is_worth_it:
            break
        n_more = min(_CHUNK, n_steps - n_run)
        for _ in range(n_more):
            replay()
        waiting.append(_fetched(steps.told[n_run : n_run + n_more]))
        n_run += n_more
    if n_left:  # else nobody asks what else was chosen
        _hear(waiting, 0, saying)
    return n_run


def _hear(waiting: deque[Fetch], n_most: int, saying: tuple[Said, Sequence[int]]) -> None:
    """Look at what was chosen until no more chunks than so many are under way."""
    said, rows = saying
    while len(waiting) > n_most:
        for told in waiting.popleft()():
            said.add(rows, told)


def _fetched(tokens: Tensor) -> Fetch:
    """Begin to copy tokens to the host; return what waits for them."""
    if tokens.device.type != "cuda":
        return tokens.clone().tolist
    here = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    here.copy_(tokens, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(tokens.device))

    def wait() -> list[list[int]]:
        arrived.synchronize()
        rows: list[list[int]] = here.tolist()
        return rows

    return wait


def _recorded(step: Step, record: Recorder) -> Step:
    """Return what replays a step, which has been run once.

    Raises:
        _NotRecordedError: If it cannot be recorded, whatever the reason.
    """
    try:
        return record(step)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise _NotRecordedError(f"{type(error).__name__}: {error}") from error


def _static_cache(past: list[tuple[Tensor, Tensor] | None], width: int) -> Any:
    """Return a cache of so many columns that begins with these; ``past`` is emptied."""
    from transformers.cache_utils import Cache, StaticLayer

    layers = []
    for place, of_layer in enumerate(past):
        layer = StaticLayer(width)
        if of_layer is not None:
            layer.update(*of_layer)
        past[place] = of_layer = None  # the room is that of a later layer's
        layers.append(layer)
    return Cache(layers=layers)


def _kept(begun: _Begun, rows: Tensor) -> _Begun:
    """Return some of the rows."""
    rows = sent(rows, begun.tokens.device)
    past = [None if pair is None else (pair[0][rows], pair[1][rows]) for pair in begun.past]
    return _Begun(begun.tokens[rows], begun.positions[rows], begun.mask[rows], past)


def _forward(model: nn.Module, **inputs: Any) -> Tensor:
    """Return the logits of the last token of every row, ``(n_rows, vocabulary)``."""
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = 1
    logits: Tensor = model(use_cache=True, **inputs).logits
    return logits[:, -1]


def _choice(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens, and the same with -1 where the logits are not finite."""
    largest, chosen = logits.max(-1)
    return chosen, chosen.masked_fill(~torch.isfinite(largest), _NOT_FINITE)


def padded(prompts: Sequence[Tokens], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return prompts padded on the left, and their mask, ``(n_rows, longest)`` int64 each."""
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return tokens, mask

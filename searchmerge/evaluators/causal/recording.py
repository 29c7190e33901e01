"""Steps of decoding that are recorded once, as a CUDA graph, and replayed.

A step of a small model runs for less time on a GPU than its hundreds of kernels take to launch. So
the cache has its full length from the first step on; nothing waits for the device: chosen tokens
come to the host some steps late, and what a row says after its end is cut.
"""

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from searchmerge.evaluators.causal.model import dtype_of
from searchmerge.evaluators.causal.steps import Begun, choice, next_logits
from searchmerge.evaluators.causal.stopping import Said

RECORD_FROM = 12
"""Steps from which recording pays, which takes about as long as three of them."""

_LEAVE_RECORDED = 0.5
"""Rows that are done leave a recorded step when this part of them is left, or less."""

_CHUNK = 4
"""Recorded steps whose tokens are fetched together."""

_AHEAD = 2
"""Chunks that are under way on the device while the host looks at the one before them."""

_WIDTH = 64
"""Columns of a static cache come in multiples of this, for which attention has fast kernels."""

Step = Callable[[], None]
Recorder = Callable[[Step], Step]
Fetch = Callable[[], list[list[int]]]


class NotRecordedError(Exception):
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


class RecordedSteps:
    """Steps of some rows, on tensors that stay where they are: one is recorded, then replayed.

    Args:
        model: What gives the logits.
        begun: The rows.
        n_steps: Steps for which there is room, 1 or more.

    Attributes:
        n_run: How many have been run.
    """

    def __init__(self, model: Any, begun: Begun, n_steps: int) -> None:
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
        self._told = begun.tokens.new_zeros(n_steps, n_rows)  # what was chosen in each step
        self.n_run = 0

    def run(self, record: Recorder, said: Said) -> None:
        """Run steps until all rows are done, or so many that it pays to record anew.

        Args:
            record: Records a step.
            said: Takes what was chosen.

        Raises:
            NotRecordedError: If a step cannot be recorded, whatever the reason.
        """
        replay, n_steps = self._recorded(record), len(self._told)
        self.n_run = 1
        waiting: deque[Fetch] = deque([_fetched(self._told[:1])])
        while True:
            _hear(waiting, 0 if self.n_run == n_steps else _AHEAD, said)
            n_left = len(said.left())
            few = n_left <= _LEAVE_RECORDED * said.n_rows
            is_worth_it = n_steps - self.n_run > RECORD_FROM and few
            if self.n_run == n_steps or not n_left or is_worth_it:
                break
            n_more = min(_CHUNK, n_steps - self.n_run)
            for _ in range(n_more):
                replay()
            waiting.append(_fetched(self._told[self.n_run : self.n_run + n_more]))
            self.n_run += n_more
        if n_left:  # else nobody asks what else was chosen
            _hear(waiting, 0, said)

    def _recorded(self, record: Recorder) -> Step:
        """Return what replays a step, which has been run once."""
        try:
            return record(self._run_one)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise NotRecordedError(f"{type(error).__name__}: {error}") from error

    def _run_one(self) -> None:
        """Run every row's next token; nothing is returned, and nothing waits."""
        self._hidden.index_fill_(3, self._column, 0)
        logits = next_logits(
            self._model,
            input_ids=self._tokens,
            attention_mask=self._hidden,
            position_ids=self._positions,
            past_key_values=self._cache,
        )
        chosen, told = choice(logits)
        self._told.index_copy_(0, self._step, told[None])
        self._tokens.copy_(chosen[:, None])
        for counter in (self._positions, self._column, self._step):
            counter.add_(1)

    def begun(self) -> Begun:
        """Return the rows after the steps that have been run."""
        n_past = self._n_past + self.n_run
        past = [
            (layer.keys[:, :, :n_past], layer.values[:, :, :n_past])
            if layer.is_initialized
            else None
            for layer in self._cache.layers
        ]
        mask = (self._hidden[:, 0, 0, :n_past] == 0).long()
        return Begun(self._tokens, self._positions, mask, past)


def _hear(waiting: deque[Fetch], n_most: int, said: Said) -> None:
    """Look at what was chosen until no more chunks than so many are under way."""
    while len(waiting) > n_most:
        for tokens in waiting.popleft()():
            said.add(tokens)


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

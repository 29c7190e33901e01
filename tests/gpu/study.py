"""A study from its file to its saved model, and where the time of its trials goes."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from transformers import LlamaForCausalLM

from searchmerge.config import RunConfig
from searchmerge.merging.engine import EngineKind
from searchmerge.run import run_study
from searchmerge.saving import MODEL_DIR
from searchmerge.search.trials import TrialRecord
from searchmerge.study import read_study
from tests.benchmarks.bench_merging import SHAPES, synchronize
from tests.gpu.report import Figures, OutOfTime, Step, Wrong
from tests.gpu.scoring import llama_config, write_tasks
from tests.tiny import EXPERTS, WORDS, make_models

_SHAPE_1B = replace(SHAPES["1b"], vocabulary=32768)  # less to write, and no fewer in a layer
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Study:
    """Where the study is run.

    Attributes:
        device: The device.
        engine: How arithmetic is run.
        small: Whether all is done in small, as on a CPU.
        folder: For its models, data and results.
    """

    device: str
    engine: EngineKind
    small: bool
    folder: Path

    @property
    def n_trials(self) -> int:
        return 3 if self.small else 20

    def steps(self) -> list[Step]:
        """Return the one step."""
        return [Step("study", f"{self.n_trials} trials and a refinement", self._run, 110)]

    def _run(self) -> Figures:
        begun = time.perf_counter()
        shape = llama_config(SHAPES["tiny"] if self.small else _SHAPE_1B).to_dict()
        make_models(
            self.folder,
            device=self.device,
            dtype=torch.bfloat16,
            noise=0.3 if self.small else 0.01,  # tiny ones tell nothing apart without it
            **{name: shape[name] for name in _SIZES},
        )
        study = read_study(self._write())
        yield {"what": "making models", "seconds": time.perf_counter() - begun}
        config = RunConfig(device=self.device, engine=self.engine)
        view, begun = _View(), time.perf_counter()
        with forward_passes(self.device) as passes:
            try:
                run_study(study, config, self.folder / "run", view)
            except OutOfTime:
                yield {"what": "until it was stopped", **view.phases()}
                if view.merge_s:
                    yield self._shares(passes.seconds(*view.search), view)
                raise
        yield {"what": "whole run", "seconds": time.perf_counter() - begun, **view.phases()}
        yield self._shares(passes.seconds(*view.search), view)
        if len(view.merge_s) != self.n_trials:
            raise Wrong(f"{len(view.merge_s)} of {self.n_trials} trials ended with a score")
        if not (self.folder / "run" / MODEL_DIR / "config.json").exists():
            raise Wrong("the study saved no model")

    def _write(self) -> Path:
        """Write the study and its tasks; return its file."""
        n_rows = 20 if self.small else 400
        tasks = self.folder / "tasks"
        tasks.mkdir()
        write_tasks(tasks, WORDS, n_rows)
        chosen = ("gpu_choices", "gpu_fewshot")
        study = {
            "base": "base",
            "experts": {name: name for name in EXPERTS},
            "space": {"method": "ties", "coefficient": {"low": 0.0, "high": 2.0}},
            "tasks": {
                name: {
                    "split": "validation",
                    "select": n_rows * 6 // 10,
                    "hold_out": n_rows * 4 // 10,
                }
                for name in chosen
            },
            "objective": "mean",
            "lm_harness": {"include_path": "tasks"},
            "search": {
                "sampler": "random",
                "n_trials": self.n_trials,
                "round_blocks": n_rows,  # nothing is decided between rounds
                "racing": "off",
                "refine": {
                    "groups": "tensor",
                    "steps": 3 if self.small else 20,
                    "batch": 4 if self.small else 64,
                    "starts": 1,
                },
            },
            "confirm": {"top_k": 1, "n_resamples": 100},
        }
        file = self.folder / "study.yaml"
        file.write_text(yaml.safe_dump(study))
        return file

    def _shares(self, forward_s: float, view: "_View") -> dict[str, Any]:
        """Return where the time went from the search's beginning to its last trial."""
        whole_s = view.search[1] - view.search[0]
        merge_s, score_s = sum(view.merge_s), sum(view.score_s)
        return {
            "what": "share of a trial outside forward passes",
            "value": 1 - forward_s / whole_s,
            "merge": merge_s / whole_s,
            "forward": forward_s / whole_s,
            "scoring beside them": (score_s - forward_s) / whole_s,
            "between trials": 1 - (score_s + merge_s) / whole_s,
            "s a trial": whole_s / len(view.merge_s),
            "trials": len(view.merge_s),
            **({} if self.small else {"at most": 0.1}),
        }


class _View:
    """Notes when phases begin and the last trial ends, and how long trials merged and scored.

    Attributes:
        merge_s: Of each trial that ended with a score.
        score_s: Of each of these too.
    """

    def __init__(self) -> None:
        self.merge_s: list[float] = []
        self.score_s: list[float] = []
        self._began: list[tuple[str, float]] = []
        self._last_trial = 0.0

    @property
    def search(self) -> tuple[float, float]:
        """When the search began, and when its last trial ended."""
        return dict(self._began)["search"], self._last_trial

    def phase(self, title: str, total: int | None, done: int = 0) -> None:
        self._began.append((title, time.perf_counter()))

    def step(self, name: str, scores: Mapping[str, float]) -> None:
        pass

    def trial(self, record: TrialRecord, *, is_best: bool) -> None:
        if self._began[-1][0] != "search":
            return
        self._last_trial = time.perf_counter()
        if not record.failure:
            self.merge_s.append(record.merge_s)
            self.score_s.append(record.score_s)

    def phases(self) -> dict[str, float]:
        """Return the seconds of each phase."""
        ends = [began for _, began in self._began[1:]] + [time.perf_counter()]
        return {
            f"{name} s": end - began for (name, began), end in zip(self._began, ends, strict=True)
        }


class _Passes:
    """Seconds of the language model's forward passes, where they ran."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._is_cuda = device.startswith("cuda")
        self._passes: list[list[Any]] = []  # when it began, on the host; then both ends

    def before(self, module: Any, _: Any) -> None:
        if isinstance(module, LlamaForCausalLM):
            self._passes.append([time.perf_counter(), self._now()])

    def after(self, module: Any, *_: Any) -> None:
        if isinstance(module, LlamaForCausalLM):
            self._passes[-1].append(self._now())

    def seconds(self, start: float, stop: float) -> float:
        """Return those of the passes that began within two times."""
        synchronize(self._device)
        chosen = [(one, end) for begun, one, end in self._passes if start <= begun <= stop]
        if self._is_cuda:
            return sum(one.elapsed_time(end) for one, end in chosen) / 1e3
        return sum(end - one for one, end in chosen)

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def forward_passes(device: str) -> Iterator[_Passes]:
    """Yield what counts the forward passes of whole models."""
    passes = _Passes(device)
    handles = [
        register_module_forward_pre_hook(passes.before),
        register_module_forward_hook(passes.after),
    ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()

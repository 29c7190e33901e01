"""Gradients by coefficients on the device: as eager arithmetic gives them, and what they cost."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from searchmerge.merging.engine import EngineKind
from searchmerge.merging.gradient import CoefficientGradients
from searchmerge.merging.merger import Merger
from searchmerge.merging.method import default_plan
from searchmerge.merging.task_vectors import TaskVectors, Weights
from searchmerge.plan import Groups, MergePlan
from tests.benchmarks.bench_merging import EXPERTS, SHAPES, Shape, synthetic
from tests.gpu.merging import timed
from tests.gpu.report import Figures, Step, Wrong
from tests.gpu.scoring import language_model

_N_TIMES = 5
_CLOSE = 0.02  # of the largest, as products are of numbers in bfloat16


@dataclass(frozen=True)
class Gradient:
    """Where gradients are measured.

    Attributes:
        device: The device.
        engines: Which ways arithmetic is run, the last one measured.
        small: Whether all is done in small, as on a CPU.
    """

    device: str
    engines: tuple[EngineKind, ...]
    small: bool

    def steps(self) -> Iterator[Step]:
        """Yield the steps."""
        yield Step("gradient", "of every tensor's coefficients", self._gradient, 60)

    def _gradient(self) -> Figures:
        shape = SHAPES["tiny"] if self.small else replace(SHAPES["1b"], vocabulary=32768)
        base, experts = synthetic(shape, self.device)
        with language_model(shape, torch.bfloat16, self.device) as model:
            yield from self._of(model, shape, base, experts)

    def _of(self, model: Any, shape: Shape, base: Weights, experts: dict[str, Weights]) -> Figures:
        targets = {n: p.data for n, p in model.named_parameters() if n in base}
        vectors = TaskVectors.from_weights(base, experts)
        tokens = torch.randint(shape.vocabulary, (4, 128), device=self.device)
        for leaf in model.parameters():
            leaf.requires_grad_()
        plain_s = statistics.median(timed(lambda: _backward(model, tokens), self.device, _N_TIMES))
        for leaf in model.parameters():
            leaf.requires_grad_(False)
            leaf.grad = None
        yield {"what": "a backward pass by every parameter", "seconds": plain_s}
        for method in ("task_arithmetic", "ties"):
            plan = default_plan(method, EXPERTS, groups=Groups.of_tensors(base))
            rows = {}
            for engine in self.engines:
                merger = Merger(vectors, targets=targets, engine=engine)
                gradients = CoefficientGradients(model, merger)
                merger.apply(plan)
                rows[engine] = _rows(gradients, plan, model, tokens)
                times = timed(
                    lambda g=gradients, p=plan: _rows(g, p, model, tokens), self.device, _N_TIMES
                )
                yield {
                    "what": f"{method}, {engine}, to a backward pass",
                    "value": statistics.median(times) / plain_s,
                    "seconds": statistics.median(times),
                }
            one, other = rows[self.engines[0]], rows[self.engines[-1]]
            apart = float((one - other).abs().max() / one.abs().max())
            yield {"what": f"{method}, largest difference between engines", "value": apart}
            if not apart < _CLOSE or not bool(one.any()):
                raise Wrong(f"{method}: gradients differ by {apart:.3g} of the largest")


def _backward(model: Any, tokens: torch.Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()


def _rows(
    gradients: CoefficientGradients, plan: MergePlan, model: Any, tokens: torch.Tensor
) -> torch.Tensor:
    with gradients.collecting(plan) as rows:
        _backward(model, tokens)
        return torch.tensor(rows())

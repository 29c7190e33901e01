"""The merger: turns a plan into weights, in a resident model or in new tensors."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

import searchmerge.merging.methods  # noqa: F401  (registers the methods)
from searchmerge.errors import SpecError
from searchmerge.merging.engine import Engine, EngineKind
from searchmerge.merging.groups import assign_groups, depth_positions
from searchmerge.merging.method import (
    DEPTH_SLOPE,
    METHODS,
    Bound,
    MergeMethod,
    Rows,
    settings_of,
    validate_plan,
)
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import MergePlan


class Merger:
    """Merges the same experts again and again, as each plan asks.

    A method measures the task vectors once, at the first plan that names it.

    Args:
        task_vectors: The base and the experts.
        targets: Name to the tensor that :meth:`apply` overwrites, e.g. views of a resident
            model's parameters; any float dtype and device. ``None`` where only
            :meth:`merged` is used.
        engine: How the arithmetic is run.

    Raises:
        SpecError: If a parameter that is merged has no target.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        targets: Mapping[str, Tensor] | None = None,
        engine: EngineKind = "auto",
    ) -> None:
        self._task_vectors = task_vectors
        self._targets = targets or {}
        self._engine = Engine(engine)
        self._methods: dict[tuple[str, tuple[str, ...]], MergeMethod] = {}
        lost = [name for name in task_vectors.weights if targets is not None and name not in targets]
        if lost:
            raise SpecError(f"the resident model has no parameter {lost[0]!r} to merge into")

    @torch.no_grad()
    def apply(self, plan: MergePlan) -> None:
        """Overwrite every target that is merged with what ``plan`` asks for.

        Raises:
            SpecError: If the plan is not legal.
            CheckpointError: If it names an expert that is not loaded.
        """
        for name, _ in self._merge(plan, lambda name, base: self._targets[name]):
            del name

    @torch.no_grad()
    def merged(
        self, plan: MergePlan, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the merged model by name, one at a time.

        Args:
            plan: What to merge.
            dtype: Of the floating-point tensors; ``None`` for the base's own.

        Raises:
            SpecError: If the plan is not legal.
            CheckpointError: If it names an expert that is not loaded.
        """
        vectors = self._task_vectors
        yield from self._merge(
            plan, lambda name, base: torch.empty(base.shape, dtype=dtype or base.dtype, device=base.device)
        )
        for name, tensor in vectors.base.items():
            if name not in vectors.weights and name not in vectors.tied:
                is_cast = dtype is not None and tensor.is_floating_point()
                yield name, tensor.to(dtype) if is_cast else tensor

    def _merge(self, plan, target) -> Iterator[tuple[str, Tensor]]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        validate_plan(plan)
        vectors = self._task_vectors.of(plan.experts)
        rows, row_of = _rows(plan, list(vectors.weights))
        bound = self._bind(plan, vectors, rows)
        scalars = _scalars(bound)
        outs = self._settled(bound, vectors, row_of, target)
        for name, tensors in vectors.weights.items():
            if outs is not None:
                yield name, outs[name]
                continue
            base = vectors.base[name]
            out = target(name, base)
            self._engine.merge(bound.combine, base, tensors, scalars[row_of[name]], out)
            yield name, out

    def _settled(self, bound, vectors, row_of, target):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """Do whole passes until the tally agrees; ``None`` for a method that has none."""
        if bound.settle is None:
            return None
        outs = {name: target(name, vectors.base[name]) for name in vectors.weights}
        current: Bound | None = bound
        while current is not None:
            scalars, total = _scalars(current), torch.zeros(2)
            for name, tensors in vectors.weights.items():
                tally = self._engine.merge(
                    current.combine, vectors.base[name], tensors, scalars[row_of[name]], outs[name]
                )
                if tally is not None:
                    total += tally.cpu()
            current = current.settle(total) if current.settle else None
        return outs

    def _bind(self, plan: MergePlan, vectors: TaskVectors, rows: Rows) -> Bound:
        key = (plan.method, plan.experts)
        if key not in self._methods:
            self._methods[key] = METHODS[plan.method](vectors)
        return self._methods[key].bind(rows)


def _scalars(bound: Bound) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float32) for row in bound.scalars]


def _rows(plan: MergePlan, names: list[str]) -> tuple[Rows, dict[str, int]]:
    """Return a plan's distinct rows, and which one each parameter has."""
    settings = {n: plan.settings.get(n, c.default) for n, c in settings_of(plan.method).items()}
    slope = float(settings.pop(DEPTH_SLOPE.name))
    group_of = assign_groups(names, plan.groups)
    factors = dict.fromkeys(names, 1.0)
    if slope:
        factors = {name: 1.0 + slope * p for name, p in depth_positions(names).items()}
    distinct = sorted({(group_of[name], factors[name]) for name in names}) or [(0, 1.0)]
    index = {pair: i for i, pair in enumerate(distinct)}
    rows = [
        {
            value: tuple(n * factor if value == "coefficient" else n for n in numbers[group])
            for value, numbers in plan.values.items()
        }
        for group, factor in distinct
    ]
    return Rows(settings, rows), {n: index[group_of[n], factors[n]] for n in names}


def merge_weights(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], plan: MergePlan
) -> dict[str, Tensor]:
    """Return the merged state dict that ``plan`` asks for.

    Args:
        base: The base model's tensors by name, any float dtype; not modified. Tensors that are
            not floating point come out as they are; names that share their storage are merged
            once and come out as one tensor.
        experts: Expert name to its tensors by name, shapes as in ``base``; not modified.
        plan: What to merge; its experts are among ``experts``.

    Returns:
        Every name of ``base``, in its dtype.

    Raises:
        SpecError: If the plan is not legal for its method.
        CheckpointError: If tensors do not fit together, or hold NaN or inf.
    """
    vectors = TaskVectors.from_weights(base, experts)
    vectors.check_finite()
    merged = dict(Merger(vectors).merged(plan))
    return {name: merged[vectors.tied.get(name, name)] for name in base}

"""The merger: turns a plan into weights, in a resident model or one tensor at a time."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.merging.at_once import AtOnce
from searchmerge.merging.engine import Engine, EngineKind
from searchmerge.merging.gradient import Directions
from searchmerge.merging.groups import depth_positions
from searchmerge.merging.kernels import float32_by_default
from searchmerge.merging.measure import Measure, MemoryBudget
from searchmerge.merging.method import (
    DEPTH_SLOPE,
    METHODS,
    MergeMethod,
    Pass,
    linear_hyperparameter,
    setting,
    validate_plan,
)
from searchmerge.merging.operands import Operands
from searchmerge.merging.residency import Memory, place, streamed
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import MergePlan

_logger = logging.getLogger(__name__)


class Merger:
    """Merges the same experts again and again, as each plan asks.

    A plan may name some of the experts, in any order. A method measures them at the first plan
    that names it and them, and is kept.

    Args:
        task_vectors: The base and the experts.
        targets: Name in the base to the tensor that :meth:`apply` overwrites, such as a view of
            a resident model's parameter; any float dtype, on any device. Of a tied parameter one
            name is enough. ``None`` where only :meth:`merged` is used.
        engine: How arithmetic is run; see :class:`Engine`.
        memory: Where base and experts lie, and how much methods may keep.
        cache: Directory for statistics, so that other mergers of the same checkpoints need not
            measure them; ``None`` for none.
        cache_key: What tells these checkpoints from all others, e.g. a hash of their files.

    Raises:
        SpecError: If a parameter has no target, or one of another shape, or one that is the
            base's own memory; or if there is a ``cache`` but no ``cache_key``.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        *,
        targets: Mapping[str, Tensor] | None = None,
        engine: EngineKind = "auto",
        memory: Memory | None = None,
        cache: Path | None = None,
        cache_key: str | None = None,
    ) -> None:
        if cache is not None and not cache_key:
            raise SpecError("merger: a cache needs a cache_key, to tell the checkpoints apart")
        memory = memory or Memory()
        self._targets = None if targets is None else _find_targets(task_vectors, targets)
        first_targets = {name: copies[0] for name, copies in (self._targets or {}).items()}
        self._devices = {
            name: first_targets.get(name, task_vectors.base[name]).device
            for name in task_vectors.weights
        }
        self._vectors = place(task_vectors, self._devices, memory.residency)
        self._engine = Engine(engine)
        first = next(iter(self._devices.values()), torch.device("cpu"))
        self._budget = MemoryBudget(memory.budget_bytes(first))
        self._cache = None if cache is None else cache / str(cache_key)
        self._everyone = self._measure(self._vectors)
        self._methods: dict[tuple[str, tuple[str, ...]], MergeMethod] = {}
        self._flat: dict[object, list[tuple[str, tuple[Tensor, ...]]]] = {}
        self._at_once = AtOnce(self._engine, first_targets)
        self._budget.readers.append(self._at_once.forget)

    @torch.no_grad()
    @float32_by_default()
    def apply(self, plan: MergePlan) -> None:
        """Overwrite every target of a merged parameter with what ``plan`` asks for, in place.

        Raises:
            SpecError: If the plan is not legal, or names an expert that is not loaded, or the
                merger was given no targets.
            EvaluationError: If a merged tensor is not finite in float16, whose range merges may
                leave; in wider dtypes that is left to :meth:`merged`, as looking takes a pass of
                its own over memory.
        """
        if self._targets is None:
            raise SpecError("merger: there are no targets to apply a plan to; use merged")
        vectors, first_pass, scales = self._bind(plan)
        work: Pass | None = first_pass
        while work is not None:
            inputs, tallies = self._inputs(vectors, work), None
            if isinstance(inputs, list):  # the same tensors each time
                tallies = self._at_once.run(vectors.experts, work, inputs, scales)
            if tallies is None:
                tallies = [
                    self._write(name, tensors, work, scales[name], self._targets[name][0])
                    for name, tensors in inputs
                ]
            work = _revised(work, tallies)
        self._finish(self._targets)

    def _finish(self, targets: Mapping[str, tuple[Tensor, ...]]) -> None:
        """Copy what was merged to further targets, and wait until all is there."""
        ends = {}
        for name, (first, *others) in targets.items():
            for other in others:
                other.copy_(first)
            if first.dtype == torch.float16:
                ends[name] = _ends(first)
        for device in dict.fromkeys(self._devices.values()):
            if device.type == "cuda":  # what fails or takes long here is not a score's doing
                torch.cuda.synchronize(device)
        _check_finite(ends)

    @torch.no_grad()
    def merged(
        self, plan: MergePlan, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the base by name, merged or as it is, one at a time.

        Names of one tied parameter come one after the other, with the same tensor.

        Args:
            plan: What to merge.
            dtype: Of all floating-point tensors; ``None`` for each one's in the base.

        Raises:
            SpecError: If the plan is not legal, or names an expert that is not loaded.
            EvaluationError: If a tensor is not finite in the dtype that it comes out in.
        """
        vectors, work, scales = self._bind(plan)
        work = self._settled(vectors, work, scales)
        for name, tensors in self._inputs(vectors, work):
            base = vectors.base[name]
            out = torch.empty(base.shape, dtype=dtype or base.dtype, device=tensors[0].device)
            with float32_by_default():
                self._write(name, tensors, work, scales[name], out)
            _check_finite({name: _ends(out)})
            for each in (name, *_aliases(vectors, name)):
                yield each, out
        for name, tensor in vectors.base.items():
            if vectors.tied.get(name, name) not in vectors.weights:
                tensor = tensor.detach()
                if dtype is not None and tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                    _check_finite({name: _ends(tensor)})
                yield name, tensor

    @property
    def targets(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Return what each merged parameter is written to, each memory once; none without any."""
        return self._targets or {}

    @torch.no_grad()
    def directions(self, plan: MergePlan) -> Directions:
        """Return how the merged parameters move with each coefficient of ``plan``.

        They do not depend on the coefficients that the plan has, nor on what was merged before.

        Raises:
            SpecError: If the plan is not legal, names an expert that is not loaded, or its
                method is not linear in its coefficients.
        """
        linear, n_experts = linear_hyperparameter(plan.method).name, len(plan.experts)
        passes: list[Pass] = []
        vectors, _, scales = self._bind(plan)  # what a method keeps of a repeated plan, it has now
        for i in range(n_experts):
            row = tuple(float(j == i) for j in range(n_experts))
            rows = (row,) * len(plan.groups)
            _, work, _ = self._bind(replace(plan, values={**plan.values, linear: rows}))
            passes.append(self._settled(vectors, work, scales))

        def operands(name: str, work: Pass) -> Operands:
            tensors = self._read(vectors, work, name)
            return self._operands(name, tuple(t.to(self._devices[name]) for t in tensors), work)

        return Directions(tuple(passes), scales, operands, self._engine, self._budget)

    @float32_by_default()
    def _bind(self, plan: MergePlan) -> tuple[TaskVectors, Pass, dict[str, float]]:
        validate_plan(plan)
        plan = _in_order(plan, self._vectors.experts)
        vectors = self._vectors.of(plan.experts)
        key = (plan.method, plan.experts)
        if key not in self._methods:
            _logger.debug("measuring for %s: %s", plan.method, ", ".join(plan.experts))
            self._methods[key] = METHODS[plan.method](self._measure(vectors))
        slope = float(setting(plan, DEPTH_SLOPE))
        scales = dict.fromkeys(vectors.weights, 1.0)
        if slope:
            positions = depth_positions(tuple(vectors.weights))
            scales = {name: 1.0 + slope * position for name, position in positions.items()}
        return vectors, self._methods[key].bind(plan), scales

    def _measure(self, vectors: TaskVectors) -> Measure:
        everyone = None if vectors is self._vectors else self._everyone
        return Measure(vectors, self._engine, self._budget, self._cache, everyone, self._devices)

    def _inputs(
        self, vectors: TaskVectors, work: Pass
    ) -> Iterable[tuple[str, tuple[Tensor, ...]]]:
        """Yield each parameter's name, base and experts, 1-D, where it is merged."""
        key = (vectors.experts, work.experts)
        if key in self._flat:
            return self._flat[key]

        def read(name: str) -> tuple[Tensor, ...]:
            return self._read(vectors, work, name)

        names = tuple(vectors.weights)
        if vectors.are_flat_on(self._devices.__getitem__):
            self._flat[key] = [(name, read(name)) for name in names]  # views: no memory of theirs
            return self._flat[key]
        return streamed(names, read, self._devices)

    def _read(self, vectors: TaskVectors, work: Pass, name: str) -> tuple[Tensor, ...]:
        """Return a parameter's base and experts as they are read, 1-D, where they lie."""
        experts = vectors.weights[name]
        chosen = experts if work.experts is None else [experts[i] for i in work.experts]
        return tuple(t.detach().reshape(-1) for t in (vectors.base[name], *chosen))

    def _operands(self, name: str, tensors: tuple[Tensor, ...], work: Pass) -> Operands:
        """Return all that the arithmetic of a pass reads of a parameter."""
        keys = work.keys(name) if work.keys else None
        kept = () if not work.kept else work.kept[name]
        kept = tuple(t.to(tensors[0].device, non_blocking=True) for t in kept)
        return Operands(tensors[0], tensors[1:], work.scalars(name), kept, keys)

    @float32_by_default()
    def _settled(self, vectors: TaskVectors, work: Pass, scales: Mapping[str, float]) -> Pass:
        """Return the pass that will stand, having gone through all parameters to find out."""
        while work.revise is not None:
            tallies = []
            for name, tensors in self._inputs(vectors, work):
                scratch = torch.empty_like(tensors[0])
                tallies.append(self._write(name, tensors, work, scales[name], scratch))
            work = _revised(work, tallies) or replace(work, revise=None)
        return work

    def _write(
        self,
        name: str,
        tensors: tuple[Tensor, ...],
        work: Pass,
        scale: float,
        out: Tensor,
    ) -> Tensor | None:
        """Merge one parameter into ``out``, of any layout; return the tally."""
        flat = out.view(-1) if out.is_contiguous() else torch.empty_like(out).reshape(-1)
        parameter = self._operands(name, tensors, work)
        tally = self._engine.merge(work.function, parameter, scale, flat)
        if not out.is_contiguous():
            out.copy_(flat.view(out.shape))
        return tally


def _ends(tensor: Tensor) -> Tensor:
    """Return the least and the greatest entry, ``(2,)`` on its device; NaN if an entry is."""
    return torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor.new_zeros(2)


def _check_finite(ends: Mapping[str, Tensor]) -> None:
    """Refuse tensors that hold NaN or inf; each device is waited for once.

    Raises:
        EvaluationError: If one does; it names the first.
    """
    together: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, extremes in ends.items():
        together.setdefault((extremes.device, extremes.dtype), []).append(name)
    for (_, dtype), names in together.items():
        finite = torch.stack([ends[name] for name in names]).isfinite().all(1).tolist()
        if not all(finite):
            raise EvaluationError(
                f"merged tensor {names[finite.index(False)]!r} is not finite in {dtype}, which "
                f"ends at {torch.finfo(dtype).max:.4g}"
            )


def _find_targets(
    vectors: TaskVectors, targets: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, ...]]:
    """Return the tensors that each merged parameter is written to, each memory once."""
    by_parameter = {}
    for name in vectors.weights:
        names = [each for each in (name, *_aliases(vectors, name)) if each in targets]
        if not names:
            raise SpecError(
                f"merger: the resident model has no tensor {name!r} to merge into; exclude it"
            )
        distinct: dict[object, Tensor] = {}
        for each in names:
            target = targets[each].detach()
            _check_target(each, target, vectors.base[name])
            distinct.setdefault((target.device, target.data_ptr(), target.stride()), target)
        by_parameter[name] = tuple(distinct.values())
    _check_apart(by_parameter)
    return by_parameter


def _check_apart(targets: Mapping[str, tuple[Tensor, ...]]) -> None:
    """Refuse a resident model that ties what an expert keeps apart."""
    seen: dict[object, str] = {}
    for name, copies in targets.items():
        for target in copies:
            place = (target.device, target.data_ptr(), target.stride())
            other = seen.setdefault(place, name)
            if other != name and target.numel():
                raise SpecError(
                    f"merger: the resident model ties {name!r} to {other!r}, which an expert "
                    "has apart; untie it"
                )


def _check_target(name: str, target: Tensor, base: Tensor) -> None:
    if target.shape != base.shape:
        raise SpecError(
            f"merger: tensor {name!r} of the resident model has shape {tuple(target.shape)}; "
            f"the base's has {tuple(base.shape)}"
        )
    same_place = target.device == base.device and target.data_ptr() == base.data_ptr()
    if same_place and target.numel():
        raise SpecError(
            f"merger: tensor {name!r} of the resident model is the base's own memory; "
            "give the base as a copy"
        )


def _aliases(vectors: TaskVectors, name: str) -> list[str]:
    return [alias for alias, used in vectors.tied.items() if used == name]


def _in_order(plan: MergePlan, loaded: tuple[str, ...]) -> MergePlan:
    """Return the same plan with its experts in the order they were loaded in."""
    if unknown := [expert for expert in plan.experts if expert not in loaded]:
        raise SpecError(
            f"plan: expert {unknown[0]!r} is not loaded (there are: {', '.join(loaded)})"
        )
    experts = tuple(expert for expert in loaded if expert in plan.experts)
    return plan if experts == plan.experts else plan.reordered(experts)


def _revised(work: Pass, tallies: Iterable[Tensor | None]) -> Pass | None:
    if work.revise is None:
        return None
    on_device: dict[torch.device, list[Tensor]] = {}
    for tally in tallies:
        if tally is not None:
            on_device.setdefault(tally.device, []).append(tally)
    total = torch.zeros(2, dtype=torch.float64)
    for device_tallies in on_device.values():
        total += torch.stack(device_tallies).sum(0, dtype=torch.float64).cpu()
    return work.revise(total)


@torch.no_grad()
def merge_weights(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], plan: MergePlan
) -> dict[str, Tensor]:
    """Return the merged state dict that ``plan`` asks for.

    Args:
        base: The base model's tensors by name, any dtype; not modified. Those that are not
            floating point come out as they are; those that share their storage are merged once
            and share it again.
        experts: Expert name to its tensors by name, in the base's shapes; not modified. Tensors
            that only an expert has do not come out.
        plan: What to merge; its experts are among ``experts``.

    Returns:
        Every name of ``base`` in its order, shape, dtype and device.

    Raises:
        SpecError: If the plan is not legal for its method, or names an unknown expert.
        CheckpointError: If tensors do not fit together, or hold NaN or inf.
    """
    validate_plan(plan)
    vectors = TaskVectors.from_weights(base, experts)
    merged = dict(Merger(vectors).merged(plan))
    for name in merged:
        if vectors.tied.get(name, name) not in vectors.weights:
            merged[name] = merged[name].clone()
    return {name: merged[vectors.tied.get(name, name)] for name in base}

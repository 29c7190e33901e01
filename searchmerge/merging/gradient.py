r"""The gradient of a loss by every coefficient of a plan, reduced as a backward pass goes.

Where the merged task vector is linear in the coefficients, a parameter p of group g is

.. math:: \theta_p = \theta_{0,p} + \sum_i \lambda_{g,i} W_{i,p}, \qquad
          \frac{\partial L}{\partial \lambda_{g,i}} =
          \sum_{p \in g} \left\langle \frac{\partial L}{\partial \theta_p}, W_{i,p} \right\rangle

with :math:`W_i` what the method merges where coefficient i is 1 and all others are 0 (as
AdaMerging does layer by layer for task arithmetic: Yang et al., 2023, arXiv:2310.02575). One
forward and one backward pass give the gradient by all coefficients, however many groups there
are. What rounding to the model's dtype does to the parameters does not enter it.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from searchmerge.errors import SpecError
from searchmerge.merging.chunks import CHUNK
from searchmerge.merging.compiled import MOST_AT_ONCE
from searchmerge.merging.engine import Engine
from searchmerge.merging.groups import assign_groups
from searchmerge.merging.kernels import float32_by_default
from searchmerge.merging.measure import MemoryBudget
from searchmerge.merging.method import Pass, linear_hyperparameter
from searchmerge.merging.operands import Operands
from searchmerge.plan import MergePlan, Rows

if TYPE_CHECKING:
    from searchmerge.merging.merger import Merger


_MOST_PASSES = 4
"""Of one kernel: eight of TIES take 38 s to compile on a CPU, in place of 17, and run no
faster for want of registers."""


@dataclass(frozen=True)
class Directions:
    """How merged parameters move with each coefficient, for all experts of a plan.

    Attributes:
        passes: For each expert, the pass that merges where its coefficient is 1, the others' 0.
        scales: Parameter name to the factor on its merged task vector.
        operands: Returns what a pass reads of a parameter, where that is merged.
        engine: Runs arithmetic.
        budget: What may be kept in memory.
        kept: Parameter name to its directions, ``(n_experts, n_entries)``, where there was room
            for them and to compute them anew takes long, as it does on a CPU; float32, but as
            exact as the gradient where that is bfloat16.
    """

    passes: tuple[Pass, ...]
    scales: Mapping[str, float]
    operands: Callable[[str, Pass], Operands]
    engine: Engine
    budget: MemoryBudget
    kept: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def _kernels(self) -> list[tuple[list[Pass], int]]:
        """The passes that one kernel runs at once, and of how many the products are asked for.

        They differ in numbers alone; a method may give passes that do not.
        """
        groups = [list(alike) for _, alike in groupby(self.passes, key=_what_is_read)]
        return [kernel for alike in groups for kernel in _of_one_size(alike)]

    @torch.no_grad()
    @float32_by_default()
    def products(self, name: str, gradient: Tensor) -> Tensor:
        """Return the inner product of a parameter's gradient with each direction.

        Args:
            name: Of the parameter.
            gradient: Of the loss by it, in its shape, any float dtype.

        Returns:
            ``(n_experts,)`` float64, where the parameter is merged.
        """
        flat = gradient.reshape(-1)
        rows = self._rows(name, flat)
        if rows is not None:
            total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
            step = CHUNK if rows.device.type == "cpu" else MOST_AT_ONCE  # each is a launch there
            for start in range(0, len(flat), step):
                numbers = flat[start : start + step].float()
                parts = rows[:, start : start + step]
                total += torch.stack([torch.dot(part.float(), numbers) for part in parts])
            return total * self.scales[name]
        products = []
        for passes, n_asked in self._kernels:
            operands = self.operands(name, passes[0])
            scalars = torch.stack([work.scalars(name) for work in passes])
            numbers = flat.to(operands.base.device)
            given = self.engine.products(passes[0].function, operands, scalars, numbers)
            products.append(given[:n_asked])
        return torch.cat(products) * self.scales[name]

    def _rows(self, name: str, like: Tensor) -> Tensor | None:
        """Return a parameter's directions, ``(n_experts, n_entries)``, if they are kept."""
        if name in self.kept:
            return self.kept[name]
        # float16 has not the range of what fine-tuning changed
        dtype = like.dtype if like.dtype == torch.bfloat16 else torch.float32
        size_bytes = dtype.itemsize * len(self.passes) * len(like)
        if not size_bytes or self.engine.is_compiled(like.device, self.passes[0].function):
            return None
        if not self.budget.take(size_bytes):
            return None
        rows = torch.empty(len(self.passes), len(like), dtype=dtype, device=like.device)
        for row, work in zip(rows, self.passes, strict=True):
            given = self.operands(name, work).with_scalars(work.scalars(name))
            self.engine.chunks.write_merged(work.function, given, row)
        self.kept[name] = rows
        return rows

    def release(self) -> None:
        """Let go of what is kept."""
        self.budget.left_bytes += sum(rows.nbytes for rows in self.kept.values())
        self.kept.clear()

    def compile(self, targets: Mapping[str, Tensor]) -> None:
        """Compile all that :meth:`products` runs, where arithmetic is compiled.

        A GPU's backward pass calls it from a thread of its own, which is no place to compile in.

        Args:
            targets: Parameter name to a tensor like its gradient.
        """
        for name, target in targets.items():
            if self.engine.is_compiled(target.device):
                self.products(name, torch.zeros_like(target))


def _of_one_size(passes: list[Pass]) -> Iterator[tuple[list[Pass], int]]:
    """Yield passes in as few parts as may be, of as many each: another size is compiled anew.

    The last one may be filled up with its last pass. Yielded too is how many are not.
    """
    n_parts = -(-len(passes) // _MOST_PASSES)
    size = -(-len(passes) // n_parts)
    for start in range(0, len(passes), size):
        part = passes[start : start + size]
        yield part + part[-1:] * (size - len(part)), len(part)


def _what_is_read(work: Pass) -> Hashable:
    """Return what tells a pass from those that differ from it in numbers alone."""
    return work.function, work.experts, id(work.kept) if work.kept else None


@dataclass
class Collected:
    """What was collected of the gradients by some plan's coefficients, until :meth:`rows`.

    Attributes:
        plan: The plan.
        sums: Parameter name to the sum of its products, ``(n_experts,)`` float64.
    """

    plan: MergePlan
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, products: Tensor) -> None:
        """Add a parameter's products with the gradient of one more backward pass."""
        self.sums[name] = self.sums[name] + products if name in self.sums else products

    def rows(self, names: tuple[str, ...]) -> Rows:
        """Return the gradient, a row per group of the plan, and begin anew.

        Args:
            names: Of all parameters that are merged.
        """
        group_of = assign_groups(names, self.plan.groups)
        total = torch.zeros(len(self.plan.groups), len(self.plan.experts), dtype=torch.float64)
        by_device: dict[torch.device, list[str]] = {}
        for name, products in self.sums.items():
            by_device.setdefault(products.device, []).append(name)
        for together in by_device.values():
            stacked = torch.stack([self.sums[name] for name in together]).cpu()
            total.index_add_(0, torch.tensor([group_of[name] for name in together]), stacked)
        self.sums.clear()
        return tuple(tuple(row) for row in total.tolist())


class CoefficientGradients:
    """Reduces the gradients of a resident model's parameters to those of a plan's coefficients.

    Each parameter's gradient is reduced to a number per expert as soon as a backward pass has
    made it, and freed: memory of one tensor's gradient is needed, and not of a model's. Where
    there is room for a model's, gradients of several passes are added first.

    Args:
        model: The resident model.
        merger: Merges into it.

    Raises:
        SpecError: If the merger writes to what is no part of the model.
    """

    def __init__(self, model: nn.Module, merger: "Merger") -> None:
        self._merger = merger
        self._names = tuple(merger.targets)
        self._directions: tuple[object, Directions] | None = None
        leaves: dict[int, list[Tensor]] = {}
        for leaf in [*model.parameters(), *model.buffers()]:
            leaves.setdefault(leaf.untyped_storage().data_ptr(), []).append(leaf)
        self._views: dict[Tensor, list[tuple[str, Tensor]]] = {}
        for name, copies in merger.targets.items():
            for view in copies:
                inside = leaves.get(view.untyped_storage().data_ptr(), [])
                holding = [leaf for leaf in inside if _holds(leaf, view)]
                if not holding:
                    raise SpecError(f"gradient: tensor {name!r} is no part of the model")
                self._views.setdefault(holding[0], []).append((name, view))

    def prepare(self, plan: MergePlan) -> None:
        """Have a plan merged from now on as it is whenever only coefficients change.

        A method may keep what repeats, and then rounds otherwise: without this a plan's weights
        would depend on what was merged before.

        Raises:
            SpecError: If the plan's method is not linear in its coefficients.
        """
        self._directions_of(plan)

    @contextmanager
    def collecting(
        self, plan: MergePlan, *, several: bool = False
    ) -> Iterator[Callable[[], Rows]]:
        """Collect the gradients of every backward pass through the model, merged by ``plan``.

        Args:
            plan: The plan.
            several: Whether several passes are to come. Their gradients are then added, in the
                model's dtype, and reduced once, as far as there is room to keep them.

        Yields:
            What returns, within the context, the gradient by the plan's coefficients of all
            passes since it was last called: a row per group, a number per expert.

        Raises:
            SpecError: If the plan's method is not linear in its coefficients.
        """
        directions, collected = self._directions_of(plan), Collected(plan)
        room = directions.budget
        added = {leaf for leaf in self._views if several and room.take(leaf.nbytes)}

        def reduce(leaf: Tensor) -> None:
            self._reduce(leaf, directions, collected)

        def rows() -> Rows:
            for leaf in added:
                reduce(leaf)
            return collected.rows(self._names)

        needed = {leaf: leaf.requires_grad for leaf in self._views}
        handles = []
        try:
            for leaf in needed:
                leaf.requires_grad_()
                if leaf not in added:
                    register: Any = leaf.register_post_accumulate_grad_hook
                    handles.append(register(reduce))
            with torch.enable_grad():
                yield rows
        finally:
            for handle in handles:
                handle.remove()
            room.left_bytes += sum(leaf.nbytes for leaf in added)
            for leaf, was_needed in needed.items():
                leaf.requires_grad_(was_needed)
                leaf.grad = None

    def _reduce(self, leaf: Tensor, directions: Directions, collected: Collected) -> None:
        """Add what a leaf's gradient says of the coefficients, and free it."""
        made, leaf.grad = leaf.grad, None
        if made is None:
            return
        gradient = _laid_out(made, leaf)
        for name, view in self._views[leaf]:
            part = gradient.as_strided(
                view.shape, view.stride(), view.storage_offset() - leaf.storage_offset()
            )
            collected.add(name, directions.products(name, part))

    def _directions_of(self, plan: MergePlan) -> Directions:
        """Return the directions of a plan: of the last one, where only coefficients differ."""
        linear = linear_hyperparameter(plan.method).name
        others = {name: rows for name, rows in plan.values.items() if name != linear}
        settings = sorted(plan.settings.items())
        key = (plan.method, plan.experts, plan.groups, repr(sorted(others.items())), settings)
        if self._directions is None or self._directions[0] != key:
            if self._directions is not None:
                self._directions[1].release()
            directions = self._merger.directions(plan)
            directions.compile(
                {n: copies[0].detach() for n, copies in self._merger.targets.items()}
            )
            self._directions = (key, directions)
        return self._directions[1]


def _holds(leaf: Tensor, view: Tensor) -> bool:
    """Return whether all of a view lies within a leaf of the same storage."""
    first, last = leaf.storage_offset(), _last(leaf)
    return first <= view.storage_offset() and _last(view) <= last


def _last(tensor: Tensor) -> int:
    """Return where the last entry of a tensor lies in its storage."""
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset()) + (int(reach) if tensor.numel() else 0)


def _laid_out(gradient: Tensor, leaf: Tensor) -> Tensor:
    """Return a gradient with its entries where those of its parameter lie, from offset 0 on."""
    if gradient.stride() == leaf.stride() and not gradient.storage_offset():
        return gradient
    laid_out = torch.empty_strided(
        leaf.shape, leaf.stride(), dtype=gradient.dtype, device=gradient.device
    )
    return laid_out.copy_(gradient)

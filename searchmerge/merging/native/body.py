"""A merge function as statements on one entry, by following what it does on a chunk."""

import math
import operator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, Node

from searchmerge.merging.kernels import Chunk, ChunkFunction
from searchmerge.merging.native.operations import (
    COMPUTED,
    MADE_OF_A_NUMBER,
    SPELLED,
    NoSourceError,
    Operand,
    Value,
    cast,
    expression,
    one,
    operand_dtypes,
    text_of,
    texts_of,
    whole_bound,
)

PART = 4096
"""Entries that a thread goes over at once, and of which each sum is formed: they stay in its
cache."""

_MOST_COUNTED = (1 << 30) // PART  # whole numbers of which 32 bits hold the sum over a part

_ENTRIES = 4099  # of the tensors that a function is followed on: a prime, and no other size

_WHERE_IT_LIES = ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking")

_VIEWS = ("select", "slice", "unbind", "squeeze", "unsqueeze")


class Layout(NamedTuple):
    """What a kernel is written for: the operands without their numbers and sizes.

    Attributes:
        base: The dtype of the base's entries.
        experts: That of each expert's.
        kept: That of each tensor the method kept.
        scalars: ``(n_scalars, n_experts)``, the shape of its scalars.
        n_keys: How many keys there are; 0 where nothing is random.
    """

    base: torch.dtype
    experts: tuple[torch.dtype, ...]
    kept: tuple[torch.dtype, ...]
    scalars: tuple[int, int]
    n_keys: int


class Body:
    """The statements of one kernel, as far as they are written.

    Entry ``i`` of input ``k`` is ``in{k}[i]``, which ``number`` reads. Names from without are
    ``scalars``, ``keys``, and ``first``, the index of entry 0 in the parameter.

    Attributes:
        inputs: The dtype of each tensor that is read: the base's, the experts', what was kept.
        before: Statements before the loop, of what is the same for all entries.
        loop: Statements on one entry.
        counters: Names of what is summed over entries; whether they are whole numbers, which the
            loop counts up in 32 bits, or else floats that it writes, one for each entry.
    """

    def __init__(self, layout: Layout) -> None:
        self.inputs: list[torch.dtype] = []
        self.before: list[str] = []
        self.loop: list[str] = []
        self.counters: dict[str, bool] = {}
        self._bounds: dict[str, int] = {}
        self._chosen: dict[str, str] = {}  # names of whole numbers to how these are chosen
        self._layout = layout
        self._n_names = 0

    def add_input(self, dtype: torch.dtype) -> str:
        """Return the number that one more tensor holds."""
        self.inputs.append(dtype)
        return f"number(in{len(self.inputs) - 1}[i])"

    def number(self, value: Value) -> str:
        """Return the expression of a float32 for one entry.

        Raises:
            NoSourceError: If it is a sum over entries, or not one number for each.
        """
        if isinstance(value.names, str) and value.names in self.counters:
            raise NoSourceError("returns a sum where entries are due")
        return cast(one(value), value.dtype, torch.float32)

    def follow(self, function: ChunkFunction) -> list[Value]:
        """Write all that a function does; return what it returns.

        Raises:
            NoSourceError: If it does what is not written here, or cannot be followed, as where
                its flow depends on the numbers.
        """
        try:
            return self._follow(function)
        except (NoSourceError, MemoryError):
            raise
        except Exception as error:  # torch's export raises anything, and so may the function
            told = next(iter(str(error).strip().splitlines()), "")
            raise NoSourceError(f"cannot be followed: {type(error).__name__}: {told}") from error

    def _follow(self, function: ChunkFunction) -> list[Value]:
        given, held = iter(self._arguments()), dict[Node, Any]()
        for node in _graph(function, self._layout).nodes:
            if node.op == "placeholder":
                held[node] = _Cell(next(given))
            elif node.op == "call_function":
                held[node] = self._call(node, held)
            elif node.op == "output":
                return [self._returned(returned, held) for returned in node.args[0]]
            else:
                raise NoSourceError(f"has a step {node.op}")
        raise NoSourceError("returns nothing")

    def _returned(self, node: Node, held: dict[Node, Any]) -> Value:
        """Return what is returned: a number for each entry, float32, or a sum over them."""
        value: Value = held[node].value
        if isinstance(value.names, str) and value.names in self.counters:
            return value
        returned = node.meta["val"]
        if returned.shape != (_ENTRIES,) or returned.dtype != torch.float32:
            raise NoSourceError(f"returns {returned.dtype} of shape {tuple(returned.shape)}")
        return value

    def _arguments(self) -> list[Value]:
        """Write how entries are read; return what a function is given, in the order of a chunk."""
        layout, real, whole = self._layout, torch.float32, torch.int64
        base = self._name(real, self.add_input(layout.base))
        deltas = [self._name(real, f"{self.add_input(d)} - {base}") for d in layout.experts]
        kept = [self._name(real, self.add_input(dtype)) for dtype in layout.kept]
        scalars = [f"scalars[{i}]" for i in range(math.prod(layout.scalars))]
        values = [Value(delta, real) for delta in deltas]
        values.append(Value(np.array(scalars, dtype=object).reshape(layout.scalars), real))
        values += [Value(entry, real) for entry in kept]
        if layout.n_keys:
            keys = np.array([f"keys[{i}]" for i in range(layout.n_keys)], dtype=object)
            values += [Value("(first + i)", whole), Value(keys, whole)]
        return values

    def _name(self, dtype: torch.dtype, text: str, *, is_uniform: bool = False) -> str:
        """Write a statement that names an expression; return the name."""
        if dtype not in COMPUTED:
            raise NoSourceError(f"computes in {dtype}")
        self._n_names += 1
        name = f"v{self._n_names}"
        statements = self.before if is_uniform else self.loop
        statements.append(f"const {COMPUTED[dtype]} {name} = {text};")
        return name

    def _call(self, node: Node, held: dict[Node, Any]) -> Any:
        """Write what one step does; return the cell, or the cells, of what it returns."""
        step = _step(node, held)
        if node.target is operator.getitem:
            return step.args[0][step.args[1]]
        if step.name.startswith("_assert"):
            return None
        if step.name in _VIEWS:
            return _view(step)
        if step.is_sum:
            return _Cell(self._sum(step))
        if _is_given_back(step):
            return step.args[0]
        if not step.is_in_place:
            return _Cell(self._operation(step))
        _check_in_place(step)
        step.args[0].value = self._operation(step)
        return step.args[0]

    def _operation(self, step: "_Step") -> Value:
        """Write one operation; return what it computes."""
        name, dtype = step.plain, step.dtype
        operands = _operands(step)
        dtypes = operand_dtypes(name, dtype, operands)
        names = [cell.value.names for cell in step.cells]
        of_entries = [of_entry for of_entry in names if isinstance(of_entry, str)]
        if any(counter in of_entries for counter in self.counters):
            raise NoSourceError(f"has {name} of a sum over entries")
        if of_entries:
            texts = [text_of(o, d) for o, d in zip(operands, dtypes, strict=True)]
            return self._bounded(step, operands, texts)
        arrays = [texts_of(o, d) for o, d in zip(operands, dtypes, strict=True)]
        if not arrays:
            raise NoSourceError(f"has {name} of what is the same for all entries")
        write = np.frompyfunc(
            lambda *texts: self._name(dtype, expression(name, dtype, texts), is_uniform=True),
            len(arrays),
            1,
        )
        return Value(np.array(write(*arrays), dtype=object), dtype)

    def _bounded(self, step: "_Step", operands: list[Operand], texts: list[Any]) -> Value:
        """Name an operation; note where it is a whole number, and how large at most."""
        name = self._name(step.dtype, expression(step.plain, step.dtype, texts))
        bound = whole_bound(step.plain, operands, self._bounds)
        if bound is not None:
            self._bounds[name] = bound
            if step.plain == "where":
                first, second = map(self._whole, operands[1:])
                self._chosen[name] = f"({texts[0]} ? {first} : {second})"
        return Value(name, step.dtype)

    def _whole(self, operand: Operand) -> str:
        """Return a whole number for one entry, in 32 bits: choosing takes no conversion."""
        if not isinstance(operand, Value):
            return str(int(operand or 0))
        return self._chosen.get(str(operand.names), f"(int32_t){one(operand)}")

    def _sum(self, step: "_Step") -> Value:
        """Write what is summed over entries; return its name."""
        value: Value = step.args[0].value
        if not isinstance(value.names, str):
            raise NoSourceError("has a sum of what is the same for all entries")
        if step.dtype != torch.float32 or step.shape:
            raise NoSourceError(f"has a sum in {step.dtype} of shape {step.shape}")
        name = f"counter{len(self.counters)}"
        self.counters[name] = self._bounds.get(value.names, math.inf) <= _MOST_COUNTED
        self.loop.append(
            f"{name} += {self._whole(value)};"
            if self.counters[name]
            else f"{name}[i] = {self.number(value)};"
        )
        return Value(name, torch.float32)


class _Cell:
    """What a tensor holds by now: an operation in place changes it for all that have it."""

    def __init__(self, value: Value) -> None:
        self.value = value


class _Step(NamedTuple):
    """One step of a function.

    Attributes:
        name: Torch's name of it.
        args: What it is given: cells, lists of them, and numbers.
        kwargs: The same by name, but for dtype and device.
        dtype: Of what it returns.
        shape: Of what it returns.
    """

    name: str
    args: list[Any]
    kwargs: dict[str, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def plain(self) -> str:
        """The name of the same operation where it is not in place."""
        return self.name.rstrip("_")

    @property
    def is_in_place(self) -> bool:
        return self.plain != self.name

    @property
    def is_sum(self) -> bool:
        return self.plain == "sum"

    @property
    def cells(self) -> list[_Cell]:
        return [arg for arg in (*self.args, *self.kwargs.values()) if isinstance(arg, _Cell)]


def _step(node: Node, held: dict[Node, Any]) -> _Step:
    """Return what a node of the graph says."""
    args = [held[arg] if isinstance(arg, Node) else arg for arg in node.args]
    kwargs = {
        key: held[arg] if isinstance(arg, Node) else arg
        for key, arg in node.kwargs.items()
        if key not in _WHERE_IT_LIES
    }
    name = "" if node.target is operator.getitem else str(node.target).split(".")[1]
    name = SPELLED.get(name, name)
    returned = node.meta.get("val")
    if isinstance(returned, Tensor):
        return _Step(name, args, kwargs, returned.dtype, tuple(returned.shape))
    if name and not name.startswith("_assert") and name not in _VIEWS:
        raise NoSourceError(f"has a step {node.target}, which returns no tensor")
    return _Step(name, args, kwargs, torch.float32, ())


def _is_given_back(step: _Step) -> bool:
    """Return whether a step returns the very tensor that it is given."""
    if step.name not in ("to", "alias", "detach"):
        return False
    if True in (*step.args[2:], *step.kwargs.values()):
        raise NoSourceError("has a conversion that may copy")
    own: Value = step.args[0].value
    return own.dtype == step.dtype


def _operands(step: _Step) -> list[Operand]:
    """Return what an operation computes with.

    Raises:
        NoSourceError: If it is given what is not looked at here.
    """
    given, kwargs = step.args, dict(step.kwargs)
    if kwargs.pop("alpha", 1) != 1:
        raise NoSourceError(f"has {step.name} with a factor")
    if step.plain == "clamp":
        bounds = dict(zip(("min", "max"), given[1:], strict=False)) | kwargs
        given, kwargs = [given[0], bounds.pop("min", None), bounds.pop("max", None)], bounds
    if kwargs:
        raise NoSourceError(f"has {step.name} with {', '.join(kwargs)}")
    if step.plain in MADE_OF_A_NUMBER:
        given = [arg for arg in given if not isinstance(arg, _Cell)]
    elif step.plain in ("to", "_to_copy", "clone"):
        given = given[:1]
    return [arg.value if isinstance(arg, _Cell) else arg for arg in given]


def _check_in_place(step: _Step) -> None:
    """Refuse changes in place of what views may share, and in another precision than it has."""
    own: Value = step.args[0].value
    if not isinstance(own.names, str):
        raise NoSourceError(f"has {step.name} of what is the same for all entries")
    dtypes = {cell.value.dtype for cell in step.cells}
    if any(dtype.is_floating_point and dtype != own.dtype for dtype in dtypes):
        raise NoSourceError(f"has {step.name} in several precisions")


class _Followed(torch.nn.Module):
    """A function as torch follows it, given a chunk's tensors one by one."""

    def __init__(self, function: ChunkFunction, layout: Layout) -> None:
        super().__init__()
        self._function, self._layout = function, layout

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        n_experts, n_kept = len(self._layout.experts), len(self._layout.kept)
        kept = given[n_experts + 1 : n_experts + 1 + n_kept]
        positions, keys = given[-2:] if self._layout.n_keys else (None, None)
        chunk = Chunk(given[:n_experts], given[n_experts], kept, positions, keys)
        returned: Any = self._function(chunk)
        if not isinstance(returned, tuple) or not all(isinstance(t, Tensor) for t in returned):
            raise TypeError("it returns something else than a tuple of tensors")
        return returned


def _graph(function: ChunkFunction, layout: Layout) -> Graph:
    """Return what a function does on a chunk; raise anything where it cannot be followed."""
    with torch.device("cpu"):
        given = [torch.zeros(_ENTRIES, dtype=torch.float32) for _ in layout.experts]
        given.append(torch.zeros(layout.scalars, dtype=torch.float32))
        given += [torch.zeros(_ENTRIES, dtype=torch.float32) for _ in layout.kept]
        if layout.n_keys:
            given += [torch.arange(_ENTRIES), torch.zeros(layout.n_keys, dtype=torch.int64)]
    followed = torch.export.export(_Followed(function, layout), tuple(given), strict=False)
    graph: Graph = followed.graph
    return graph


def _view(step: _Step) -> Any:
    """Return the cell, or the cells, of a part of what is the same for all entries."""
    name, value, where = step.name, step.args[0].value, step.args[1:]
    if step.kwargs or isinstance(value.names, str):
        raise NoSourceError(f"has a {name} of entries")
    names = value.names

    def cell(part: Any) -> _Cell:
        return _Cell(Value(np.asarray(part, dtype=object), value.dtype))

    if name == "select":
        return cell(np.take(names, where[1], axis=where[0]))
    if name == "squeeze":
        return cell(names.squeeze(*(tuple(w) if isinstance(w, list) else w for w in where)))
    if name == "unsqueeze":
        return cell(np.expand_dims(names, where[0]))
    axis = where[0] if where else 0
    along = np.moveaxis(names, axis, 0)
    if name == "unbind":
        return [cell(part) for part in along]
    return cell(np.moveaxis(along[slice(*where[1:])], 0, axis))

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
)

_ENTRIES = 4099  # of the tensors that a function is followed on: a prime, and no other size

_WHERE_IT_LIES = ("layout", "device", "pin_memory", "memory_format", "non_blocking")

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
        counters: Names of the whole numbers that the loop counts up.
    """

    def __init__(self, layout: Layout) -> None:
        self.inputs: list[torch.dtype] = []
        self.before: list[str] = []
        self.loop: list[str] = []
        self.counters: list[str] = []
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
        if value.names in self.counters:
            raise NoSourceError("returns a sum where entries are due")
        return cast(one(value), value.dtype, torch.float32)

    def follow(self, function: ChunkFunction) -> list[Value]:
        """Write all that a function does; return what it returns.

        Raises:
            NoSourceError: If it does what is not written here.
        """
        given, held = iter(self._arguments()), dict[Node, Any]()
        for node in _graph(function, self._layout).nodes:
            if node.op == "placeholder":
                held[node] = _Cell(next(given))
            elif node.op == "call_function":
                held[node] = self._call(node, held)
            elif node.op == "output":
                return [held[returned].value for returned in node.args[0]]
            else:
                raise NoSourceError(f"has a step {node.op}")
        raise NoSourceError("returns nothing")

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
        args: list[Any] = [held[arg] if isinstance(arg, Node) else arg for arg in node.args]
        if node.target is operator.getitem:
            return args[0][args[1]]
        name = str(node.target).split(".")[1]
        name = SPELLED.get(name, name)
        if name.startswith("_assert"):
            return None
        kwargs = {
            key: held[arg] if isinstance(arg, Node) else arg
            for key, arg in node.kwargs.items()
            if key not in (*_WHERE_IT_LIES, "dtype")
        }
        if name in _VIEWS:
            return _view(name, args, kwargs)
        plain, dtype = name.rstrip("_"), _dtype(node)
        if plain in ("to", "alias", "detach") and dtype == args[0].value.dtype:
            return args[0]
        if plain == "sum":
            return _Cell(self._sum(args[0].value))
        value = self._operation(plain, dtype, args, kwargs)
        if plain == name:
            return _Cell(value)
        if dtype != args[0].value.dtype:
            raise NoSourceError(f"has {name} of {args[0].value.dtype}")
        args[0].value = value
        return args[0]

    def _operation(
        self, name: str, dtype: torch.dtype, args: list[Any], kwargs: dict[str, Any]
    ) -> Value:
        """Write one operation; return what it computes."""
        if kwargs.pop("alpha", 1) != 1:
            raise NoSourceError(f"has {name} with a factor")
        given = [*args, *kwargs.values()]
        if name == "clamp" and kwargs:
            bounds = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
            given = [args[0], bounds.get("min"), bounds.get("max")]
        if name in MADE_OF_A_NUMBER:
            given = [arg for arg in given if not isinstance(arg, _Cell)]
        elif name in ("to", "_to_copy", "clone"):
            given = given[:1]
        operands: list[Operand] = [arg.value if isinstance(arg, _Cell) else arg for arg in given]
        dtypes = operand_dtypes(name, dtype, operands)
        names = [arg.value.names for arg in (*args, *kwargs.values()) if isinstance(arg, _Cell)]
        of_entries = [of_entry for of_entry in names if isinstance(of_entry, str)]
        if any(counter in of_entries for counter in self.counters):
            raise NoSourceError(f"has {name} of a sum over entries")
        if of_entries:
            texts = [text_of(o, d) for o, d in zip(operands, dtypes, strict=True)]
            return Value(self._name(dtype, expression(name, dtype, texts)), dtype)
        arrays = [texts_of(o, d) for o, d in zip(operands, dtypes, strict=True)]
        if not arrays:
            raise NoSourceError(f"has {name} of what is the same for all entries")
        write = np.frompyfunc(
            lambda *texts: self._name(dtype, expression(name, dtype, texts), is_uniform=True),
            len(arrays),
            1,
        )
        return Value(np.array(write(*arrays), dtype=object), dtype)

    def _sum(self, value: Value) -> Value:
        """Write the count of whole numbers; return it."""
        name = f"counter{len(self.counters)}"
        if not isinstance(value.names, str):
            raise NoSourceError("has a sum of what is the same for all entries")
        self.counters.append(name)
        self.loop.append(f"{name} += (int32_t){value.names};")
        return Value(name, torch.float32)


class _Cell:
    """What a tensor holds by now: an operation in place changes it for all that have it."""

    def __init__(self, value: Value) -> None:
        self.value = value


class _Followed(torch.nn.Module):
    """A function as torch follows it, given a chunk's tensors one by one."""

    def __init__(self, function: ChunkFunction, layout: Layout) -> None:
        super().__init__()
        self._function, self._layout = function, layout

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        n_experts, n_kept = len(self._layout.experts), len(self._layout.kept)
        kept = given[n_experts + 1 : n_experts + 1 + n_kept]
        positions, keys = given[-2:] if self._layout.n_keys else (None, None)
        return self._function(Chunk(given[:n_experts], given[n_experts], kept, positions, keys))


def _graph(function: ChunkFunction, layout: Layout) -> Graph:
    """Return what a function does on a chunk.

    Raises:
        NoSourceError: If it cannot be followed, as where its flow depends on the numbers.
    """
    given = [torch.zeros(_ENTRIES) for _ in layout.experts]
    given.append(torch.zeros(layout.scalars))
    given += [torch.zeros(_ENTRIES) for _ in layout.kept]
    if layout.n_keys:
        given += [torch.arange(_ENTRIES), torch.zeros(layout.n_keys, dtype=torch.int64)]
    try:
        followed = torch.export.export(_Followed(function, layout), tuple(given), strict=False)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise NoSourceError(f"cannot be followed: {error}") from error
    graph: Graph = followed.graph
    return graph


def _dtype(node: Node) -> torch.dtype:
    """Return the dtype of what a step returns."""
    returned = node.meta.get("val")
    if not isinstance(returned, Tensor):
        raise NoSourceError(f"has a step {node.target}, which returns no tensor")
    return returned.dtype


def _view(name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Return the cell, or the cells, of a part of what is the same for all entries."""
    value, *where = args[0].value, *args[1:]
    if kwargs or isinstance(value.names, str):
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

"""LoRA on parameters, which is how PEFT adapts experts that a loaded model holds as one tensor.

A checkpoint may hold each expert's weights apart, or the gate's and the up projection's: a tensor
of it is then a part of the parameter, and changes by that part of the parameter's update.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from searchmerge.checkpoints.lora_update import Place, Update
from searchmerge.checkpoints.renames import by_checkpoint_names
from searchmerge.checkpoints.tensor_files import TensorHeader
from searchmerge.errors import CheckpointError

_FACTOR = re.compile(
    r"^base_model\.model\.(?P<module>.+?)(?P<around>(\.base_layer)*)\.lora_(?P<side>[AB])\.weight$"
)
"""The last parameter of a module that is adapted is wrapped last: the first has most around it."""

Scale = tuple[int, float]
"""The rank, and what the product of the factors is multiplied by."""


class AdaptedParameter:
    """A parameter that an adapter changes, and its two factors.

    Args:
        module: The module that holds it, by its name in the loaded model.
        name: Its name there.
        model: The model, which may be without data.
    """

    def __init__(self, module: str, name: str, model: Any) -> None:
        self._model = model
        self.full_name = f"{module}.{name}"
        owner = model.get_submodule(module)
        shape = tuple(getattr(owner, name).shape)
        self._shape = shape if len(shape) == 3 else (1, *shape)
        self._is_2d = len(shape) == 2
        self._is_transposed = len(shape) == 3 and bool(getattr(owner, "is_transposed", False))

    def updates(
        self, factors: tuple[str, str], scale: Scale, headers: Mapping[str, TensorHeader]
    ) -> dict[str, Update]:
        """Return what is done to each tensor of the checkpoint that is a part of it.

        Args:
            factors: Names of A ``(n_experts * r, n_in)`` and B ``(n_out, r * n_experts)``.
            scale: Rank and scaling.
            headers: Of the adapter's tensors.

        Raises:
            CheckpointError: If the factors do not fit, or the parameter is stored in a form in
                which no tensor is a part of it; it names the parameter.
        """
        n_experts, *each = self._shape
        n_out, n_in = reversed(each) if self._is_transposed else each
        rank, scaling = scale
        needed = (n_experts * rank, n_in), (n_out, rank * n_experts)
        found = tuple(headers[key].shape for key in factors)
        if found != needed:
            raise CheckpointError(
                f"lora_A and lora_B of {self.full_name!r} have shapes {list(found[0])} and "
                f"{list(found[1])}; {list(needed[0])} and {list(needed[1])} are needed for "
                f"{n_experts} experts of rank {rank}"
            )
        return {
            name: Update(factors, scaling=scaling, rank=rank, place=self._place(view))
            for name, view in self._views().items()
        }

    def _views(self) -> Mapping[str, Tensor]:
        """Return the parts that the checkpoint's tensors are, of a tensor that nobody writes."""
        whole = torch.empty(self._shape[self._is_2d :], dtype=torch.uint8)
        views = by_checkpoint_names(self._model, {self.full_name: whole})
        place = whole.untyped_storage().data_ptr()
        size = sum(view.numel() for view in views.values())
        are_views = all(v.untyped_storage().data_ptr() == place for v in views.values())
        if size != whole.numel() or not are_views:
            raise CheckpointError(
                f"{self.full_name!r} is stored in another order than the model holds it in; merge "
                "the adapter with PEFT (merge_and_unload) and give the model that this makes"
            )
        return views

    def _place(self, view: Tensor) -> Place:
        return Place(
            self._shape,
            tuple(view.shape),
            tuple(view.stride()),
            int(view.storage_offset()),
            self._is_transposed,
        )


def adapted_parameters(model: Any, targets: Sequence[str]) -> dict[str, list[AdaptedParameter]]:
    """Return the parameters that PEFT adapts, by module, in the order in which it wraps them.

    Args:
        model: The model, which may be without data.
        targets: ``target_parameters`` of ``adapter_config.json``: names or their ends.
    """
    adapted: dict[str, list[AdaptedParameter]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            key = f"{module_name}.{name}"
            if parameter.ndim in (2, 3) and any(
                key == target or key.endswith(f".{target}") for target in targets
            ):
                adapted.setdefault(module_name, []).append(
                    AdaptedParameter(module_name, name, model)
                )
    return adapted


def pairs_of_factors(
    file: Path, keys: Sequence[str], adapted: Mapping[str, Sequence[AdaptedParameter]]
) -> list[tuple[AdaptedParameter, tuple[str, str]]]:
    """Return each adapted parameter of which a file has factors, and their names in it.

    Args:
        file: The adapter's, for messages.
        keys: The names of its tensors.
        adapted: What :func:`adapted_parameters` returns.

    Raises:
        CheckpointError: If one of two factors is missing.
    """
    sides: dict[tuple[str, int], dict[str, str]] = {}
    for key in keys:
        match = _FACTOR.match(key)
        if match is not None and match["module"] in adapted:
            n_around = match["around"].count(".base_layer")
            sides.setdefault((match["module"], n_around), {})[match["side"]] = key
    pairs = []
    for (module, n_around), found in sides.items():
        parameters = adapted[module]
        if n_around >= len(parameters) or len(found) < 2:
            raise CheckpointError(
                f"{file}: of {module!r} it holds {', '.join(sorted(found.values()))}; A and B of "
                f"{len(parameters)} parameters are needed, as target_parameters says"
            )
        pairs.append((parameters[len(parameters) - 1 - n_around], (found["A"], found["B"])))
    return pairs

"""LoRA adapters: added to their base once, exactly, and kept as the tensors that they change.

Files and configuration are those of the PEFT library.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from searchmerge.checkpoints.embeddings import is_vocabulary
from searchmerge.checkpoints.fingerprint import fingerprint
from searchmerge.checkpoints.lora_config import ADAPTER_CONFIG, SUPPORTED, AdapterConfig
from searchmerge.checkpoints.lora_experts import AdaptedParameter
from searchmerge.checkpoints.lora_fit import changed_header, check_parts, orient
from searchmerge.checkpoints.lora_layers import Layers, find_name
from searchmerge.checkpoints.lora_names import (
    factor_of,
    is_inside,
    is_saved_twice,
    part_of_module,
    plain_name,
)
from searchmerge.checkpoints.lora_targets import selects
from searchmerge.checkpoints.lora_update import Update, updated
from searchmerge.checkpoints.made_once import made_once
from searchmerge.checkpoints.tensor_files import (
    MappedTensors,
    TensorHeader,
    read_headers,
)
from searchmerge.errors import CheckpointError

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""In the order in which PEFT looks for them."""
_logger = logging.getLogger(__name__)

_Find = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that fits its base, read by its headers alone.

    Attributes:
        file: Its file of weights.
        base_name: The model that it says it was trained on, as whoever trained it wrote it.
        updates: What it does to each tensor that it changes, by the name in the base.
        headers: What these tensors become.
    """

    file: Path
    base_name: str
    updates: Mapping[str, Update]
    headers: Mapping[str, TensorHeader]

    def fingerprint(self, base_fingerprint: str, cache_dir: Path) -> str:
        """Return 64 hexadecimal digits that differ where base, adapter or scaling differ.

        Raises:
            CheckpointError: If the file has gone or cannot be read.
        """
        own = fingerprint(dict.fromkeys(read_headers(self.file), self.file), cache_dir)
        updates = [(name, *astuple(update)) for name, update in sorted(self.updates.items())]
        identity = json.dumps((base_fingerprint, own, updates))
        return hashlib.sha256(identity.encode()).hexdigest()


def touches_embeddings(directory: Path, tied: Collection[str]) -> bool:
    """Return whether an adapter has layers of its own in place of input or output embeddings.

    Trainable tokens are none: PEFT keeps those of tied embeddings together.

    Args:
        directory: The adapter.
        tied: What the base ties, by the names in its checkpoint.
    """
    names = dict.fromkeys(tied)
    keys = (key for key in read_headers(_adapter_file(directory)) if "trainable_tokens" not in key)
    factors = ((key, factor_of(key)) for key in keys)
    changed = (f"{module}.weight" if module else plain_name(key) for key, module in factors)
    return any(is_vocabulary(name) or find_name(name, names) is not None for name in changed)


def read_adapter(
    directory: Path,
    base_headers: Mapping[str, TensorHeader],
    base_dir: Path,
    *,
    trust_remote_code: bool = False,
) -> Adapter:
    """Return what an adapter does to its base; no tensor is read.

    Args:
        directory: The adapter: its configuration and file of weights.
        base_headers: Dtype and shape of the base's tensors, by their names in its checkpoint.
        base_dir: Where transformers can load the base from; it is asked for names that the
            checkpoint does not have.
        trust_remote_code: Whether Python files of the base may run.

    Raises:
        CheckpointError: If the adapter cannot be read, is of an unsupported kind, or does not
            fit the base.
    """
    config = AdapterConfig.read(directory)
    file = _adapter_file(directory)
    layers = Layers(config, base_dir, trust_remote_code)
    stored = read_headers(file)
    if not stored:
        raise CheckpointError(f"{file}: holds no tensor")
    of_parameters = layers.parameters(file, stored)
    factors = {key for _, pair in of_parameters for key in pair}
    plain = {key: header for key, header in stored.items() if key not in factors}
    headers = _selected(file, config, plain)
    find = _finder(headers, base_headers, layers)
    updates = _plan(file, headers, find, layers)
    for module, part in filter(None, map(part_of_module, headers)):
        if part == "rows":
            layers.refuse_output_with_bias(file, module)
    updates = orient(file, updates, headers, base_headers, layers.are_transposed)
    updates |= _of_parameters(file, config, of_parameters, stored, base_headers)
    for name, update in updates.items():
        check_parts(file, name, update, stored, base_headers)
    results = {name: changed_header(name, updates[name], stored, base_headers) for name in updates}
    return Adapter(file, config.base_name, updates, results)


def materialise(
    adapter: Adapter,
    *,
    base_weights: Mapping[str, Tensor],
    base_fingerprint: str,
    cache_dir: Path,
) -> Path:
    """Add an adapter to its base and return the file with the tensors that it changes.

    What factors change is computed and stored in float32 (:func:`updated`); modules that were
    trained whole are stored as they are. The file is made once for this base and adapter: two
    processes that ask for it at once make it once.

    Args:
        adapter: What :func:`read_adapter` returned.
        base_weights: The base's tensors; only those that change are read.
        base_fingerprint: Tells one base from another.
        cache_dir: Where the file is kept.

    Raises:
        CheckpointError: If the adapter can no longer be read, or the file cannot be written.
    """
    folder = cache_dir / "adapters" / adapter.fingerprint(base_fingerprint, cache_dir)[:32]
    return made_once(
        folder, adapter.headers, lambda: _results(adapter, base_weights), cache_dir=cache_dir
    )


def _adapter_file(directory: Path) -> Path:
    for name in _ADAPTER_FILES:
        if (file := directory / name).exists():
            return file
    raise CheckpointError(f"{directory}: has no {' or '.join(_ADAPTER_FILES)}")


def _selected(
    file: Path, config: AdapterConfig, headers: Mapping[str, TensorHeader]
) -> Mapping[str, TensorHeader]:
    """Return the tensors of a file without those of layers that the adapter is not put on.

    PEFT leaves them out without a word. A bias that it saved from inside of such a layer is one.
    """
    modules = set(filter(None, map(factor_of, headers)))
    if not modules:
        return headers
    if config.settings.get("target_modules") is None:
        raise CheckpointError(
            f"{config.file}: target_modules is missing; name the layers that the "
            f"adapter is put on, e.g. {min(modules).rpartition('.')[2]!r}"
        )
    foreign = sorted(name for name in modules if not selects(config.settings, name))
    if not foreign:
        return headers
    more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
    told = (
        f"{file}: holds layers that {ADAPTER_CONFIG} does not select (target_modules, "
        f"layers_to_transform, exclude_modules, ...): {foreign[0]!r}{more}"
    )
    if len(foreign) == len(modules):
        raise CheckpointError(f"{told}; it selects none of those that it holds")
    _logger.warning("%s; they are left out, as PEFT does", told)
    return {key: header for key, header in headers.items() if not is_inside(key, foreign)}


def _plan(
    file: Path,
    headers: Mapping[str, TensorHeader],
    find: _Find,
    layers: Layers,
) -> dict[str, Update]:
    """Return, by name in the base, what the adapter does to each tensor it changes."""
    updates: dict[str, Update] = {}
    modules: dict[str, dict[str, str]] = {}
    for key in (key for key in headers if not is_saved_twice(key, headers)):
        name = plain_name(key)
        if (part := part_of_module(key)) is not None:
            modules.setdefault(part[0], {})[part[1]] = key
        elif ".lora_" in name or "trainable_tokens" in name:
            raise CheckpointError(f"{file}: {key!r} is not understood; {SUPPORTED}")
        else:
            updates[find(name) or name] = Update(replacement=key)
    for module, parts in modules.items():
        for suffix, update in _of_module(file, layers.config, module, parts).items():
            changed = find(f"{module}.{suffix}")
            if changed is None:
                is_new = update.addend and find(f"{module}.weight")
                raise CheckpointError(
                    f"{file}: changes {module + '.' + suffix!r}, which the base does not have"
                    + (_told_biases(layers.bias_fields(module)) if is_new else "")
                )
            earlier = updates.get(changed, Update())
            updates[changed] = replace(update, replacement=earlier.replacement)
    return updates


def _told_biases(fields: Sequence[str]) -> str:
    """Return what can be done about a bias that an adapter gives to a layer without one."""
    told = "; lora_bias gives the layer a bias that this model has no place for"
    if fields:
        told += f": give base and experts biases, of zeros, by {' or '.join(fields)} in the base's"
        return f"{told} config.json, or train the adapter without lora_bias"
    return f"{told}, and its config.json no field for; train the adapter without lora_bias"


def _of_module(
    file: Path, config: AdapterConfig, module: str, parts: Mapping[str, str]
) -> dict[str, Update]:
    """Return what is done to the weight and the bias of a module, shapes not yet checked."""
    if "rows" in parts:
        return {"weight": Update(rows=parts["rows"], tokens=config.tokens(module))}
    if missing := sorted({"A", "B"} - parts.keys()):
        raise CheckpointError(f"{file}: lora_{missing[0]} of {module!r} is missing")
    uses_dora = config.settings.get("use_dora")
    if bool(uses_dora) != ("magnitude" in parts):
        there = "holds a" if "magnitude" in parts else "has no"
        raise CheckpointError(
            f"{file}: {there} lora_magnitude_vector of {module!r}; use_dora is "
            f"{uses_dora!r} in {ADAPTER_CONFIG}"
        )
    rank, scaling = config.scale(module)
    weight = Update(
        factors=(parts["A"], parts["B"]),
        scaling=scaling,
        magnitude=parts.get("magnitude"),
        start=config.start,
        rank=rank,
    )
    if "addend" not in parts:
        return {"weight": weight}
    return {"weight": weight, "bias": Update(addend=parts["addend"], scaling=scaling)}


def _of_parameters(
    file: Path,
    config: AdapterConfig,
    adapted: Sequence[tuple[AdaptedParameter, tuple[str, str]]],
    headers: Mapping[str, TensorHeader],
    base: Mapping[str, TensorHeader],
) -> dict[str, Update]:
    """Return, by name in the base, what the factors of parameters do to its tensors."""
    updates: dict[str, Update] = {}
    for parameter, factors in adapted:
        scale = config.scale(parameter.full_name)
        try:
            parts = parameter.updates(factors, scale, headers)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from error
        for name, update in parts.items():
            changed, shape = find_name(name, base), update.place.shape if update.place else ()
            if changed is None or base[changed].shape != shape:
                there = "does not have" if changed is None else "has in another shape"
                raise CheckpointError(
                    f"{file}: changes {parameter.full_name!r}, of which the base {there} {name!r}"
                )
            updates[changed] = update
    return updates


def _finder(
    headers: Mapping[str, TensorHeader], base: Mapping[str, TensorHeader], layers: Layers
) -> _Find:
    """Return the function that gives the base's name of a tensor, None where it has none.

    Transformers is asked for other names only where an adapter needs them.
    """
    wanted = {f"{module}.weight" for module, _ in filter(None, map(part_of_module, headers))}
    renames: Mapping[str, str] = {}
    if any(find_name(name, base) is None for name in wanted):
        known = layers.names()
        renames = {name: stored for name, stored in known.items() if stored in base}

    def find(name: str) -> str | None:
        if (found := find_name(name, base)) is None and (resident := find_name(name, renames)):
            return renames[resident]
        return found

    return find


def _results(adapter: Adapter, base: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the changed tensors, one at a time.

    A tensor holds its values until the next one is asked for: all are computed in one buffer.
    """
    own = MappedTensors(dict.fromkeys(read_headers(adapter.file), adapter.file))
    low_rank = [name for name, update in adapter.updates.items() if update.factors]
    sizes = (math.prod(adapter.headers[name].shape) for name in low_rank)
    buffer = torch.empty(max(sizes, default=0))
    for name, update in adapter.updates.items():
        start = own[update.replacement] if update.replacement else base[name]
        yield name, updated(update, start, own, buffer)

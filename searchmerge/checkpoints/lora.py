"""LoRA adapters: added to their base once, exactly, and kept as the tensors that they change.

The update of a weight is ``scaling * B @ A`` (Hu et al., 2021, arXiv:2106.09685), with a scaling
of ``alpha / r``, or ``alpha / sqrt(r)`` where the adapter is rank-stabilised (Kalajdzievski, 2023,
arXiv:2312.03732). Files and configuration are those of the PEFT library.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from searchmerge.checkpoints.files import (
    COUNT,
    MODEL_FILE,
    NUMBER,
    NUMBERS,
    SWITCH,
    TEXT,
    check_free_space,
    describe_write_error,
    read_json,
)
from searchmerge.checkpoints.fingerprint import fingerprint
from searchmerge.checkpoints.renames import resident_names
from searchmerge.checkpoints.tensor_files import (
    MappedTensors,
    TensorFileWriter,
    TensorHeader,
    read_headers,
)
from searchmerge.durable import read_checked, sync_directory, with_checksum, write_atomically
from searchmerge.errors import CheckpointError

_logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILE = "adapter_model.safetensors"
_CONTENT_FILE = "content.json"  # beside a cached adapter: its fingerprint
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")
_SUPPORTED = "supported are LoRA adapters of linear and embedding layers, without bias or DoRA"
_NEEDED = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],),
    "kasa_config": ({},),
    "monteclora_config": ({},),
    "velora_config": ({},),
    "arrow_config": ({},),
}
"""Settings under which an adapter is more, or something else, than ``scaling * B @ A``."""
_KEYS = {
    "peft_type": TEXT,
    "r": COUNT,
    "lora_alpha": NUMBER,
    "rank_pattern": NUMBERS,
    "alpha_pattern": NUMBERS,
    "use_rslora": SWITCH,
    "fan_in_fan_out": SWITCH,
}
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga", "orthogonal", "mica")
"""Initialisations whose adapters are trained on a base that they have changed."""


_Find = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class _Update:
    """How one tensor of the base is changed.

    Attributes:
        factors: Names of A ``(r, n_in)`` and B ``(n_out, r)`` in the adapter's file; ``None``
            where the tensor is only replaced.
        replacement: Name of the tensor that takes the place of the base's, before the factors
            are added; ``None`` where the base's own stays.
        scaling: What ``B @ A`` is multiplied by.
        transposed: Whether the base stores this weight as ``(n_in, n_out)``.
    """

    factors: tuple[str, str] | None = None
    replacement: str | None = None
    scaling: float = 1.0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that fits its base, read by its headers alone.

    Attributes:
        file: Its safetensors file.
        updates: What it does to each tensor that it changes, by the name in the base.
        headers: What these tensors become.
    """

    file: Path
    updates: Mapping[str, _Update]
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


def read_adapter(
    directory: Path, base_headers: Mapping[str, TensorHeader], base_dir: Path
) -> Adapter:
    """Return what an adapter does to its base; no tensor is read.

    Args:
        directory: The adapter: its configuration and safetensors file.
        base_headers: Dtype and shape of the base's tensors, by their names in its checkpoint.
        base_dir: Where transformers can load the base from; it is asked for names that the
            checkpoint does not have.

    Raises:
        CheckpointError: If the adapter cannot be read, is of an unsupported kind, or does not
            fit the base.
    """
    config = read_json(directory / ADAPTER_CONFIG, _KEYS)
    _check_supported(directory, config)
    file = _adapter_file(directory)
    headers = read_headers(file)
    find = _finder(headers, base_headers, base_dir)
    updates = _plan(file, config, headers, find)
    updates = _orient(file, config, updates, headers, base_headers)
    results = {name: _header(name, updates[name], headers, base_headers) for name in updates}
    return Adapter(file, updates, results)


def materialise(
    adapter: Adapter,
    *,
    base_weights: Mapping[str, Tensor],
    base_fingerprint: str,
    cache_dir: Path,
) -> Path:
    """Add an adapter to its base and return the file with the tensors that it changes.

    Each is exactly ``base.float() + scaling * B @ A``, computed and stored in float32; modules
    that were trained whole are stored as they are. The file is made once for this base and
    adapter: two processes that ask for it at once make it once.

    Args:
        adapter: What :func:`read_adapter` returned.
        base_weights: The base's tensors; only those that change are read.
        base_fingerprint: Tells one base from another.
        cache_dir: Where the file is kept.

    Raises:
        CheckpointError: If the adapter can no longer be read, or the file cannot be written.
    """
    from filelock import FileLock

    digest = adapter.fingerprint(base_fingerprint, cache_dir)[:32]
    target = cache_dir / "adapters" / digest / MODEL_FILE
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / "lock"):
            if not _is_whole(target, cache_dir):
                _write(target, adapter.headers, _results(adapter, base_weights))
                content = {"fingerprint": _content(target, cache_dir)}
                write_atomically(target.with_name(_CONTENT_FILE), with_checksum(content))
    except OSError as error:
        raise CheckpointError(describe_write_error(target, adapter.headers, error)) from error
    return target


def _content(file: Path, cache_dir: Path) -> str:
    return fingerprint(dict.fromkeys(read_headers(file), file), cache_dir)


def _is_whole(file: Path, cache_dir: Path) -> bool:
    """Return whether a file was made before and is as it was written."""
    if not file.exists():
        return False
    try:
        noted = read_checked(file.with_name(_CONTENT_FILE))
        if noted.get("fingerprint") == _content(file, cache_dir):
            return True
        reason = "it is not as it was written"
    except (OSError, ValueError) as error:  # a CheckpointError is a ValueError
        reason = str(error)
    _logger.warning("%s: damaged, and made again: %s", file, reason)
    return False


def _check_supported(directory: Path, config: Mapping[str, Any]) -> None:
    file = directory / ADAPTER_CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type is {kind!r}; {_SUPPORTED}")
    for key, allowed in _NEEDED.items():
        found = config.get(key)
        if found is not None and found not in allowed:
            raise CheckpointError(f"{file}: {key} is {found!r}; {_SUPPORTED}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, so the adapter belongs to a changed base; "
            "convert it to a plain LoRA when saving it with PEFT"
        )


def _adapter_file(directory: Path) -> Path:
    if (file := directory / _ADAPTER_FILE).exists():
        return file
    if (old := directory / "adapter_model.bin").exists():
        raise CheckpointError(f"{old}: convert the adapter to {_ADAPTER_FILE}")
    raise CheckpointError(f"{file}: no such file")


def _plan(
    file: Path,
    config: Mapping[str, Any],
    headers: Mapping[str, TensorHeader],
    find: _Find,
) -> dict[str, _Update]:
    """Return, by name in the base, what the adapter does to each tensor it changes."""
    updates: dict[str, _Update] = {}
    factors: dict[str, dict[str, str]] = {}
    for key in headers:
        name = key.removeprefix(_PREFIX)
        if match := _FACTOR.match(name):
            factors.setdefault(match["module"], {})[match["side"]] = key
        elif ".lora_" in name or "trainable_tokens" in name:
            raise CheckpointError(f"{file}: {key!r} is not understood; {_SUPPORTED}")
        else:
            plain = name.replace(".base_layer.", ".")
            updates[find(plain) or plain] = _Update(replacement=key)
    if not headers:
        raise CheckpointError(f"{file}: holds no tensor")
    for module, sides in factors.items():
        name, update = _low_rank(file, config, module, sides, find)
        earlier = updates.get(name, _Update())
        updates[name] = replace(update, replacement=earlier.replacement)
    return updates


def _low_rank(
    file: Path,
    config: Mapping[str, Any],
    module: str,
    sides: Mapping[str, str],
    find: _Find,
) -> tuple[str, _Update]:
    """Return the base's name of a module's weight, and its update, shapes not yet checked."""
    module = module.replace(".base_layer", "")
    name = find(f"{module}.weight")
    if name is None:
        raise CheckpointError(
            f"{file}: changes {module + '.weight'!r}, which the base does not have"
        )
    if missing := {"A", "B"} - sides.keys():
        raise CheckpointError(f"{file}: lora_{missing.pop()} of {module!r} is missing")
    rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not rank or alpha is None:
        raise CheckpointError(f"{file.parent / ADAPTER_CONFIG}: r or lora_alpha is missing")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return name, _Update(factors=(sides["A"], sides["B"]), scaling=scaling)


def _finder(
    headers: Mapping[str, TensorHeader], base: Mapping[str, TensorHeader], base_dir: Path
) -> _Find:
    """Return the function that gives the base's name of a tensor, None where it has none.

    Transformers is asked for other names only where an adapter needs them.
    """
    plain = (key.removeprefix(_PREFIX).replace(".base_layer.", ".") for key in headers)
    wanted = {f"{match['module']}.weight" for key in plain if (match := _FACTOR.match(key))}
    renames: Mapping[str, str] = {}
    if any(_find(name, base) is None for name in wanted):
        known = resident_names(base_dir)
        renames = {name: stored for name, stored in known.items() if stored in base}

    def find(name: str) -> str | None:
        if (found := _find(name, base)) is None and (resident := _find(name, renames)):
            return renames[resident]
        return found

    return find


def _find(name: str, base: Mapping[str, Any]) -> str | None:
    """Return the base's name of a tensor, with or without the name of the model in front."""
    if name in base:
        return name
    _, _, rest = name.partition(".")
    if rest in base:
        return rest
    fronts = {known.partition(".")[0] for known in base if known.endswith(f".{name}")}
    longer = [f"{front}.{name}" for front in sorted(fronts) if f"{front}.{name}" in base]
    return longer[0] if len(longer) == 1 else None


def _pattern(patterns: Mapping[str, float] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that ends the module's name, as PEFT matches it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _orient(
    file: Path,
    config: Mapping[str, Any],
    updates: Mapping[str, _Update],
    headers: Mapping[str, TensorHeader],
    base: Mapping[str, TensorHeader],
) -> dict[str, _Update]:
    """Settle which weights are stored transposed, and refuse those that do not fit.

    A shape that is not square answers for itself. A square one is as the configuration says, or
    as the other weights are: PEFT writes one setting for layers of both kinds.
    """
    shapes = {name: _shapes(file, name, update, headers, base) for name, update in updates.items()}
    any_transposed = bool(config.get("fan_in_fan_out")) or any(
        found != made and found == made[::-1] and not _is_embedding(updates[name])
        for name, (found, made) in shapes.items()
        if made
    )
    oriented = {}
    for name, (found, made) in shapes.items():
        update = updates[name]
        if update.factors is None:
            oriented[name] = update
            continue
        square = len(set(made)) == 1
        flip = (_is_embedding(update) or any_transposed) if square else found != made
        if found != (made[::-1] if flip else made):
            raise CheckpointError(
                f"{file}: the update of {name!r} has shape {list(made)}; "
                f"the base's tensor has shape {list(found)}"
            )
        oriented[name] = replace(update, transposed=flip)
    return oriented


def _is_embedding(update: _Update) -> bool:
    return update.factors is not None and ".lora_embedding_" in update.factors[0]


def _shapes(
    file: Path,
    name: str,
    update: _Update,
    headers: Mapping[str, TensorHeader],
    base: Mapping[str, TensorHeader],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of the tensor that is changed, and of ``B @ A``; () where only replaced."""
    found = (headers[update.replacement] if update.replacement else base[name]).shape
    if update.factors is None:
        return found, ()
    first, second = (headers[key].shape for key in update.factors)
    if len(first) != 2 or len(second) != 2 or first[0] != second[1]:
        raise CheckpointError(
            f"{file}: lora_A and lora_B of {name!r} have shapes {list(first)} and "
            f"{list(second)}; {_SUPPORTED}"
        )
    return found, (second[0], first[1])


def _header(
    name: str,
    update: _Update,
    headers: Mapping[str, TensorHeader],
    base: Mapping[str, TensorHeader],
) -> TensorHeader:
    start = headers[update.replacement] if update.replacement else base[name]
    return start if update.factors is None else replace(start, dtype=torch.float32)


def _write(
    target: Path, headers: Mapping[str, TensorHeader], results: Iterable[tuple[str, Tensor]]
) -> None:
    """Write the changed tensors to a file that is whole once it has its name."""
    check_free_space(target.parent, headers, target)
    part = target.with_name(f"{MODEL_FILE}.part")
    try:
        with TensorFileWriter(part, headers) as writer:
            for name, tensor in results:
                writer.write(name, tensor)
        part.replace(target)
        sync_directory(target.parent)
    finally:
        part.unlink(missing_ok=True)


def _results(adapter: Adapter, base: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the changed tensors, one at a time: float32 where factors are added.

    A tensor holds its values until the next one is asked for: all are computed in one buffer.
    """
    own = MappedTensors(dict.fromkeys(read_headers(adapter.file), adapter.file))
    low_rank = [name for name, update in adapter.updates.items() if update.factors]
    sizes = (math.prod(adapter.headers[name].shape) for name in low_rank)
    buffer = torch.empty(max(sizes, default=0))
    for name, update in adapter.updates.items():
        start = own[update.replacement] if update.replacement else base[name]
        if update.factors is None:
            yield name, start
            continue
        first, second = (own[key].float() for key in update.factors)
        product = buffer[: start.numel()].view(len(second), -1)  # (n_out, n_in)
        torch.mm(second, first, out=product).mul_(update.scaling)
        yield name, (product.T if update.transposed else product).add_(start)

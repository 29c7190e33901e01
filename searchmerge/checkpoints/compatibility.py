"""Whether experts can be merged with their base, by configurations, headers and tokenizers."""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from searchmerge.checkpoints.checkpoint import Checkpoint
from searchmerge.checkpoints.embeddings import aliases, is_vocabulary, says_untied
from searchmerge.checkpoints.heads import (
    Beyond,
    advice,
    beyond_base,
    refuse_foreign,
    unused_tensors,
)
from searchmerge.checkpoints.model_config import comparable_config, differences, pooling_tokens
from searchmerge.checkpoints.renames import without_data
from searchmerge.checkpoints.tensor_files import TensorHeader
from searchmerge.checkpoints.tokenizer_files import difference, read_tokenizer
from searchmerge.errors import CheckpointError

_ROWS_ADVICE = "`vocabulary: base`, or add its rows with `vocabulary: union`"
_HEAD = re.compile(r"(classifier|classification_head|score|head)(?=\.)")
"""How classifiers of transformers name their heads."""


def check_compatible(  # noqa: PLR0913
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    *,
    exclude: Sequence[str] = (),
    vocabulary: Literal["same", "base"] = "same",
    tokenizers: Literal["same", "any"] = "same",
    may_differ: Sequence[str] = (),
    auto_class: str | None = None,
) -> None:
    """Refuse experts that cannot be merged on this base; no tensor is read.

    Task heads may differ (:func:`searchmerge.checkpoints.heads.beyond_base`). Tensors that are
    not floating, or that the models' class has no use for, come from the base, and need not be
    in an expert.

    Args:
        base: The model the experts were trained from.
        experts: The experts, by the names the study gives them.
        exclude: Regular expressions, searched in tensor names; what matches is not merged, and
            may differ or be missing.
        vocabulary: ``base``: embeddings may have another number of rows than the base's.
        tokenizers: ``any``: an expert may have another tokenizer.
        may_differ: Dotted names of fields of the configuration that change a forward pass, and
            in which experts may differ from the base.
        auto_class: The class that models are loaded as; ``None`` is that which the base's
            configuration names.

    Raises:
        CheckpointError: For the first that does not fit; it names the models and the tensor,
            what was found, and what the study can say about it.
    """
    excluded = _excluded((base, *experts.values()), exclude)
    unused = unused_tensors(base, auto_class)
    names = {name for checkpoint in (base, *experts.values()) for name in checkpoint.headers}
    model = without_data(base.path, auto_class, trust_remote_code=base.trust_remote_code)
    _check_configs(base, experts, may_differ, pooling_tokens(model))
    _check_floating("base", base)
    for name, expert in experts.items():
        _check_floating(f"expert {name!r}", expert)
        refuse_foreign(
            name, base, expert, _without(beyond_base(base, expert, auto_class), excluded)
        )
        merged = _merged(base, expert, excluded.union(unused))
        _check_complete(name, base, expert, merged, names)
        _check_shapes(name, expert, merged, names, vocabulary)
        if tokenizers == "same":
            _check_tokenizer(name, base, expert)


def doubts(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Yield what can be merged and yet is probably not meant, one line each.

    These are an adapter that was trained on another base, an expert that equals the base, and
    two that equal one another. Reads tensors up to the first that differs.

    Args:
        base: The model the experts were trained from.
        experts: The experts, by the names the study gives them.
    """
    for name, expert in experts.items():
        if expert.adapter is not None and not _names_base(expert.adapter.base_name, base):
            yield (
                f"expert {name!r} ({expert.name}) is an adapter of "
                f"{expert.adapter.base_name!r}; the base is {base.name}"
            )
        if _equal(base, expert):
            yield (
                f"expert {name!r} ({expert.name}) equals the base ({base.name}) in all tensors "
                "that both have"
            )
    for (one, first), (other, second) in itertools.combinations(experts.items(), 2):
        if _equal(first, second):
            yield (
                f"experts {one!r} ({first.name}) and {other!r} ({second.name}) are equal in all "
                "tensors that both have"
            )


def _names_base(told: str, base: Checkpoint) -> bool:
    """Return whether what an adapter calls its base may be this base, wherever that is."""
    names = (base.name, str(base.path), str(base.config.get("_name_or_path") or ""))
    return not told or _last_part(told) in {_last_part(name) for name in names if name}


def _last_part(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()


def _equal(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether two models have the same values in all tensors that both have."""
    first, second = one.weights(), other.weights()
    files, others = one.files, other.files
    return all(
        (files[name] == others[name] and one.renamed.get(name) == other.renamed.get(name))
        or (
            first[name].shape == second[name].shape
            and torch.equal(first[name].float(), second[name].float())
        )
        for name in one.headers
        if name in other.headers
    )


def _excluded(checkpoints: Iterable[Checkpoint], patterns: Sequence[str]) -> frozenset[str]:
    names = {name for checkpoint in checkpoints for name in checkpoint.headers}
    excluded: set[str] = set()
    for pattern in patterns:
        try:
            matched = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise CheckpointError(
                f"exclude: {pattern!r} is no regular expression: {error}"
            ) from error
        if not matched:
            some = ", ".join(sorted(names)[:3])
            raise CheckpointError(
                f"exclude: {pattern!r} matches no tensor (there are {some}, ...)"
            )
        excluded |= matched
    return frozenset(excluded)


def _check_floating(who: str, checkpoint: Checkpoint) -> None:
    quantized = checkpoint.config.get("quantization_config")
    if quantized:
        kind = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else "?"
        raise CheckpointError(
            f"{who} ({checkpoint.name}) is quantized ({kind}); only floating weights can be merged"
        )


def _check_configs(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    may_differ: Sequence[str],
    read: Collection[str],
) -> None:
    """Refuse experts that compute something else with the same weights."""
    unused = dict.fromkeys(may_differ)
    for name, expert in experts.items():
        if expert.adapter is not None:  # its configuration is the base's
            continue
        found = differences(*_same_kind(name, base, expert), read)
        for key in [k for k in unused if any(_names(k, field) for field in found)]:
            unused.pop(key)
        left = [field for field in found if not any(_names(k, field) for k in may_differ)]
        if left:
            _refuse_config(name, base, expert, {field: found[field] for field in left})
    if unused:
        raise CheckpointError(
            f"may_differ: {next(iter(unused))!r} differs in no expert; give the dotted names of "
            "fields that do"
        )


def _names(key: str, field: str) -> bool:
    """Return whether a key of ``may_differ`` is a field, or what holds it."""
    return field == key or field.startswith(f"{key}.")


def _same_kind(name: str, base: Checkpoint, expert: Checkpoint) -> tuple[Any, Any]:
    """Return both configurations; of a model with a language model within, that of the latter.

    Raises:
        CheckpointError: If they are models of different kinds.
    """
    ours, theirs = (_architecture(checkpoint.config) for checkpoint in (base, expert))
    configs = tuple(
        comparable_config(c.config, c.path, trust_remote_code=c.trust_remote_code)
        for c in (base, expert)
    )
    if ours == theirs:
        return configs[0], configs[1]
    within = [getattr(config, "text_config", None) for config in configs]
    if within[0] is not None and _plain_kind(within[0].model_type) == theirs:
        return within[0], configs[1]
    if within[1] is not None and _plain_kind(within[1].model_type) == ours:
        return configs[0], within[1]
    raise CheckpointError(
        f"expert {name!r} ({expert.name}) is a {theirs} model; "
        f"the base ({base.name}) is a {ours} model"
    )


def _plain_kind(kind: str) -> str:
    """Return the kind of a language model that has the same layers, e.g. Qwen2 for Qwen2-VL's."""
    return re.sub(r"(_5)?_vl(_moe)?_text$", r"\2", kind)


def _refuse_config(
    name: str, base: Checkpoint, expert: Checkpoint, found: Mapping[str, tuple[Any, Any]]
) -> None:
    (field, (ours, theirs)), *others = found.items()
    more = f" (also different: {', '.join(other for other, _ in others)})" if others else ""
    raise CheckpointError(
        f"expert {name!r} ({expert.name}) has {field} {theirs!r} in its config.json; the base "
        f"({base.name}) has {ours!r}{more}, and the merged model would run with the base's; "
        f"accept that with `may_differ: [{', '.join(found)}]`"
    )


def _architecture(config: Mapping[str, Any]) -> str:
    """Return the kind of model; the class of the whole where a configuration does not say."""
    return str(config.get("model_type") or (config.get("architectures") or ["unknown"])[0])


def _without(found: Beyond, excluded: frozenset[str]) -> Beyond:
    return Beyond(*(tuple(n for n in names if n not in excluded) for names in found))


def _merged(base: Checkpoint, expert: Checkpoint, left: frozenset[str]) -> dict[str, TensorHeader]:
    """Return the base's tensors that an expert must have, with their headers in the base."""
    once_more = {} if says_untied(expert.config) else aliases(base.headers, base.config)
    return {
        tensor: header
        for tensor, header in base.headers.items()
        if tensor not in left and header.dtype.is_floating_point
        if tensor in expert.headers or tensor not in once_more
    }


def _check_complete(
    name: str,
    base: Checkpoint,
    expert: Checkpoint,
    merged: Mapping[str, TensorHeader],
    names: set[str],
) -> None:
    missing = [tensor for tensor in merged if tensor not in expert.headers]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"expert {name!r} ({expert.name}) does not have {missing[0]!r}{others}, which the "
            f"base ({base.name}) has; leave it as in the base with {advice(missing, names)}"
        )


def _check_shapes(
    name: str,
    expert: Checkpoint,
    merged: Mapping[str, TensorHeader],
    names: set[str],
    vocabulary: Literal["same", "base"],
) -> None:
    for tensor, header in merged.items():
        found = expert.headers[tensor]
        if found.shape == header.shape:
            continue
        by_rows = is_vocabulary(tensor) and found.shape[1:] == header.shape[1:]
        if not (vocabulary == "base" and by_rows):
            way_out = _ROWS_ADVICE if by_rows else advice([tensor], names)
            _refuse_shape(name, tensor, found, header, way_out)


def _refuse_shape(
    name: str, tensor: str, found: TensorHeader, header: TensorHeader, way_out: str
) -> None:
    if head := _HEAD.match(tensor):
        way_out += f", or each expert's own with `classification.heads: ['^{head[0]}\\.']`"
    raise CheckpointError(
        f"{tensor!r} has shape {list(found.shape)} in expert {name!r} and {list(header.shape)} "
        f"in the base; keep the base's with {way_out}"
    )


def _check_tokenizer(name: str, base: Checkpoint, expert: Checkpoint) -> None:
    if base.tokenizer_dir == expert.tokenizer_dir:
        return
    ours, theirs = (read_tokenizer(model.tokenizer_dir) for model in (base, expert))
    if ours is None or theirs is None:
        return
    if (found := difference(ours, theirs)) is not None:
        raise CheckpointError(
            f"expert {name!r} ({expert.name}) has another tokenizer than the base ({base.name}): "
            f"{found}; accept it with `tokenizers: any`, or take the tokens that it has added "
            "with `vocabulary: union`"
        )

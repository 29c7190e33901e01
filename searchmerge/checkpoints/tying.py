"""Embeddings that some models tie and others do not: then all hold them apart."""

from collections.abc import Iterable, Mapping

from searchmerge.checkpoints.checkpoint import Checkpoint, equal_twins
from searchmerge.checkpoints.renames import tied_names


def untie_where_needed(
    base: Checkpoint, experts: Mapping[str, Checkpoint], auto_class: str | None = None
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Return base and experts, all with those output embeddings that one of them has apart.

    Where a model ties its output embedding to its input embedding, the one is the other's twin.
    Where all models do, they are returned as they are. Reads embeddings that are stored twice.

    Args:
        base: The base model.
        experts: The experts, with the base's names.
        auto_class: The class that models are loaded as; ``None`` is that which the base's
            configuration names.
    """
    pairs = tied_names(
        base.path, base.headers, auto_class, trust_remote_code=base.trust_remote_code
    )
    if not pairs:
        return base, {name: _with_head_of(base, expert) for name, expert in experts.items()}
    apart = _held_apart(base, experts.values(), pairs)
    if not apart:
        return base, dict(experts)
    untied = {name: _untied(expert, apart) for name, expert in experts.items()}
    return _untied(base, apart), untied


def _held_apart(
    base: Checkpoint, experts: Iterable[Checkpoint], pairs: Mapping[str, str]
) -> dict[str, str]:
    """Return the pairs of names that are two tensors in a model, or become so with others."""
    apart: set[str] = set()
    for model in (base, *experts):
        if model.base is None or model.adapter is None:
            stored_twice = {n: used for n, used in pairs.items() if n in model.headers}
            apart |= stored_twice.keys() - equal_twins(model, stored_twice).keys()
        else:
            layers = model.adapter.headers.keys()
            twins = {n: used for n, used in pairs.items() if n in model.base.twins}
            apart.update(n for n, used in twins.items() if n in layers or used in layers)
    if apart and not base.config.get("is_encoder_decoder"):
        return dict(pairs)  # where a configuration says untied, transformers ties none of them
    return {name: used for name, used in pairs.items() if name in apart}


def _untied(model: Checkpoint, apart: Mapping[str, str]) -> Checkpoint:
    """Return a model that has all of these tensors."""
    whole = model if model.base is None else model.base
    if whole is not model and whole.twins:  # the adapter was put on an untied base
        return model
    return model.untied(equal_twins(whole, apart))


def _with_head_of(base: Checkpoint, expert: Checkpoint) -> Checkpoint:
    """Return an expert that ties its output embedding as one that the base has apart."""
    missing = [name for name in base.headers if name not in expert.headers]
    if not missing or expert.adapter is not None:
        return expert
    pairs = tied_names(expert.path, expert.headers, trust_remote_code=expert.trust_remote_code)
    twins = {name: pairs[name] for name in missing if name in pairs}
    return expert.untied(equal_twins(expert, twins)) if twins else expert

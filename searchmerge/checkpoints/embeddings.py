"""Which tensors have one row per token, and which of them are one tensor under two names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_INPUT = re.compile(
    r"(^|\.)(embed_tokens|wte|tokens_embed|word_embeddings?|shared|embed_in|tok_embeddings)\.weight$"
)
_OUTPUT = re.compile(
    r"(^|\.)(lm_head|embed_out|output_projection|predictions\.decoder|lm_head\.decoder)\.weight$"
)
_OUTPUT_BIAS = re.compile(
    r"(^|\.)(lm_head|predictions|lm_head\.decoder|predictions\.decoder)\.bias$"
)


def is_vocabulary(name: str) -> bool:
    """Return whether a tensor, by its name, has one row (or entry) per token."""
    return any(pattern.search(name) for pattern in (_INPUT, _OUTPUT, _OUTPUT_BIAS))


def says_untied(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration says that output and input embeddings differ."""
    places = (config, config.get("text_config") or {})
    return any(place.get("tie_word_embeddings") is False for place in places)


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says that output and input embeddings differ.

    An encoder-decoder's says the same of the embeddings of its halves, and how outputs are
    scaled: it stays, as transformers ties no tensors that are both stored and differ.
    """
    if config.get("is_encoder_decoder"):
        return dict(config)
    key = "tie_word_embeddings"
    parts = {
        name: {**part, key: False}
        for name, part in config.items()
        if isinstance(part, dict) and key in part
    }
    return {**config, **parts, key: False}


def aliases(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Return, by names alone, which tensors are another name of an embedding.

    A language model's configuration may tie its output embedding to its input embedding, and an
    encoder-decoder's those of its two halves to a shared one. Such a tensor need not be stored
    twice, yet may be.

    Args:
        names: The names of all stored tensors.
        config: The model's ``config.json``; where it says that nothing is tied, nothing is.

    Returns:
        The name that is used, for each that is the same once more.
    """
    if says_untied(config):
        return {}
    embeddings = [name for name in names if _INPUT.search(name)]
    if not embeddings:
        return {}
    canonical = _shared(embeddings)
    found = {name: canonical for name in embeddings if name != canonical and _is_half(name)}
    found.update((name, canonical) for name in names if _OUTPUT.search(name))
    return found


def _shared(embeddings: list[str]) -> str:
    """Return ``shared.weight`` where there is one, else the shortest name, else the first."""
    return min(embeddings, key=lambda name: (not re.search(r"(^|\.)shared\.", name), len(name)))


def _is_half(name: str) -> bool:
    return re.search(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$", name) is not None

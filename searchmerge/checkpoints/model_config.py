"""Configurations of models: read without running their code, and told apart by what they do."""

import inspect
import math
import re
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from searchmerge.checkpoints.files import library_errors

_COMPARED_ELSEWHERE = {
    "model_type",
    "vocab_size",  # by the shapes of the embeddings
    "tie_word_embeddings",  # by the tensors that are stored
    "tie_encoder_decoder",
    "quantization_config",  # is refused
}
_OF_A_HEAD = {
    "architectures",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "encoder_stride",  # of masked images
    "sparse_prediction",  # of masked words, where there are labels
    "sparse_pred_ignore_index",
}
_OF_GENERATION = {
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "unk_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "begin_suppress_tokens",
    "suppress_tokens",
    "prefix",
    "max_length",
    "min_length",
    "do_sample",
    "num_beams",
    "early_stopping",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
}
_OF_A_PROGRAM = {
    "transformers_version",
    "name_or_path",
    "auto_map",
    "custom_pipelines",
    "dtype",
    "torch_dtype",
    "torchscript",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "tokenizer_class",
    "attn_implementation",
    "deterministic_flash_attn",
    "chunk_size_feed_forward",  # the same values, in less memory
    "pretraining_tp",
    "gradient_checkpointing",
    "apply_spec_augment",
}
_FREE = _COMPARED_ELSEWHERE | _OF_A_HEAD | _OF_GENERATION | _OF_A_PROGRAM
"""Fields that may differ: no output of a merged model depends on them."""

_FREE_KINDS = re.compile(
    r"^_"  # what a library notes for itself
    r"|drop(out|_path|_rate)|pdrop$|layerdrop"
    r"|(^|_)init(ializer)?(_|$)"
    r"|(^|_)loss(_|$)|jitter|^mask_(time|feature)_"
)
"""Fields that only training reads."""

_IN_LAYER_TYPES = {"use_sliding_window", "max_window_layers"}
"""What transformers turns into ``sliding_window`` and ``layer_types``, which are compared."""

_PADDING, _END, _START = "pad_token_id", "eos_token_id", "decoder_start_token_id"
_FROM_PADDING = "create_position_ids_from_input_ids"
"""What code calls where positions are counted from the id of padding on, as RoBERTa does."""

_LENGTH = "max_position_embeddings"
_LENGTH_MATTERS = ("dynamic", "yarn", "longrope")
"""The kinds of rotary embedding whose angles may depend on the longest sequence."""

_ONLY_IMAGES = re.compile(r"\.mrope_")
"""How positions of images are divided; those of a text are the same in all parts."""

_ROPE_DEFAULTS = {
    "partial_rotary_factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
}


def load_config(model_dir: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the configuration that transformers reads in a directory.

    Args:
        model_dir: A model's directory.
        trust_remote_code: Whether Python files of the model may run.

    Raises:
        CheckpointError: If it cannot be read, or needs code that may not run.
    """
    from transformers import AutoConfig

    with library_errors(f"{model_dir}: config.json"):
        return AutoConfig.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=trust_remote_code
        )


def comparable_config(
    values: Mapping[str, Any], model_dir: Path, *, trust_remote_code: bool = False
) -> Any:
    """Return a configuration in the form in which :func:`differences` compares it.

    Args:
        values: What ``config.json`` says.
        model_dir: The directory of that file.
        trust_remote_code: Whether Python files of the model may run.

    Returns:
        What transformers makes of it, or the bare values of a model that transformers does not
        have.

    Raises:
        CheckpointError: If transformers finds a value that it does not accept.
    """
    from transformers import CONFIG_MAPPING

    if values.get("model_type") in CONFIG_MAPPING or trust_remote_code:
        return load_config(model_dir, trust_remote_code=trust_remote_code)
    return SimpleNamespace(**values)


def pools_by_padding(model: Any) -> bool:
    """Return whether a classifier of sequences pools the last token that is not padding."""
    return _pools_by(_PADDING, model)


def _pools_by(name: str, model: Any) -> bool:
    """Return whether a classifier of sequences reads a token's id from its configuration."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return False
    code = inspect.getsource(type(model).forward)
    return re.search(rf"\.{name}\b", code) is not None


def pooling_tokens(model: Any) -> frozenset[str]:
    """Return the token ids in a configuration that decide what a classifier of sequences pools.

    Decoders pool the last token that is not padding, encoder-decoders that at the end; what
    their decoders read begins with a token of its own. Where a configuration names no padding,
    whoever fills texts says what it is.

    Args:
        model: A model of transformers; ``None`` where it cannot be made.
    """
    tokens = {name for name in (_PADDING, _END) if _pools_by(name, model)}
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return frozenset()
    if getattr(model.config.get_text_config(), _PADDING, None) is None:
        tokens.discard(_PADDING)
    return frozenset(tokens | ({_START} if model.config.is_encoder_decoder else set()))


def differences(base: Any, expert: Any, read: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Return the fields that change a forward pass and differ, with both values.

    Defaults are filled in, and older spellings count as the newer ones, as transformers has it.

    Args:
        base: What :func:`comparable_config` returned.
        expert: The same of another model of this kind.
        read: Fields that are compared too, as the class that models are loaded as reads them.

    Returns:
        Dotted name, e.g. ``rope_parameters.rope_theta``, to the base's value and the expert's;
        ``None`` where one does not have the field.
    """
    ours, theirs = (dict(_compared(config, read)) for config in (base, expert))
    return {
        name: (ours.get(name), theirs.get(name))
        for name in dict.fromkeys((*ours, *theirs))
        if not _equal(ours.get(name), theirs.get(name))
        and not (_ONLY_IMAGES.search(name) and None in (ours.get(name), theirs.get(name)))
    }


def _compared(config: Any, read: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields that change a forward pass, those of a configuration within too."""
    from transformers import PretrainedConfig

    values = {
        key: value
        for key, value in vars(config).items()
        if key in read or not _is_free(key, config)
    }
    heads, width = (getattr(config, key, None) for key in ("num_attention_heads", "hidden_size"))
    if values.get("head_dim") is None and isinstance(heads, int) and isinstance(width, int):
        values["head_dim"] = width // heads if heads else None
    for key, value in values.items():
        if isinstance(value, PretrainedConfig):
            yield from _compared(value, read, f"{prefix}{key}.")
        elif key == "rope_parameters":
            yield from _flat(_plain_rope(value or {}), f"{prefix}{key}")
        else:
            yield from _flat(value, f"{prefix}{key}")


def _is_free(key: str, config: Any) -> bool:
    if key == _PADDING and not isinstance(config, SimpleNamespace):
        return not _mentions(config, re.escape(_FROM_PADDING))
    if key in _FREE or _FREE_KINDS.search(key):
        return True
    if key in _IN_LAYER_TYPES:
        return hasattr(config, "layer_types") or hasattr(config, "sliding_window")
    if key == _LENGTH:
        return not _kinds_of_rope(getattr(config, "rope_parameters", None)) & {*_LENGTH_MATTERS}
    return not (_is_declared(key, config) or _is_read(key, config))


def _is_declared(key: str, config: Any) -> bool:
    if isinstance(config, SimpleNamespace):  # nobody says what its code reads
        return True
    return key in getattr(type(config), "__dataclass_fields__", {})


def _is_read(key: str, config: Any) -> bool:
    """Return whether the model's code names a field that its configuration class does not.

    Programs that train note things of their own in a configuration; only what the model's code
    names can change what it computes.
    """
    return _mentions(config, rf"""(config\.|["']){re.escape(key)}\b""")


def _mentions(config: Any, pattern: str) -> bool:
    """Return whether a pattern occurs in the code of a configuration's models."""
    import inspect

    folder = Path(inspect.getfile(type(config))).parent
    return any(
        re.search(pattern, file.read_text(encoding="utf-8"))
        for file in sorted(folder.glob("modeling_*.py"))
    )


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}")
    else:
        yield name, value


def _plain_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters with defaults filled in, and no field under an older name."""
    plain = {
        key: _plain_rope(value) if isinstance(value, Mapping) else deepcopy(value)
        for key, value in parameters.items()
        if value is not None and not (key == "type" and "rope_type" in parameters)
    }
    return {**_ROPE_DEFAULTS, **plain} if "rope_type" in plain else plain


def _kinds_of_rope(parameters: Mapping[str, Any] | None) -> set[str]:
    found: set[str] = set()
    for key, value in (parameters or {}).items():
        if isinstance(value, Mapping):
            found |= _kinds_of_rope(value)
        elif key == "rope_type":
            found.add(str(value))
    return found


def _equal(one: Any, other: Any) -> bool:
    """Return whether two values are the same; numbers that were written in float32 are.

    A switch that is not set is off.
    """
    numbers = (int, float)
    if None in (one, other):
        return all(value is None or value is False for value in (one, other))
    if isinstance(one, numbers) and isinstance(other, numbers):
        return math.isclose(one, other, rel_tol=1e-6)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)

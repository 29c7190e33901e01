"""Classifiers of a saved merge: the merged encoder with an expert's own head."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from searchmerge.checkpoints.checkpoint import Checkpoint, main_dtype, open_checkpoint
from searchmerge.checkpoints.files import read_json
from searchmerge.checkpoints.model_config import pools_by_padding
from searchmerge.checkpoints.renames import head_names
from searchmerge.checkpoints.resident import labelled, load_resident
from searchmerge.errors import CheckpointError, SpecError
from searchmerge.evaluators.heads import PooledClassifier, Pooling, model_head, pooled_head
from searchmerge.evaluators.inputs import Processors

HEADS_DIR = "heads"
"""The folder of a saved model that holds ``<expert>.safetensors`` and ``<expert>.json``."""


@dataclass(frozen=True)
class SavedHead:
    """An expert's private tensors, and how they make a classifier of an encoder.

    Attributes:
        tensors: By their names in the expert's checkpoint.
        model_class: The class of transformers that the encoder is loaded as; ``None`` where
            nothing says how these tensors are used.
        pooling: What the head, a linear layer, is applied to; ``None`` where the head is the
            class's own.
        labels: The name of each class, in the order of the logits.
    """

    tensors: Mapping[str, Tensor]
    model_class: str | None
    pooling: Pooling | None = None
    labels: tuple[str, ...] = ()


def head_files(
    heads: Mapping[str, SavedHead], dtype: torch.dtype | None = None
) -> dict[str, str | bytes]:
    """Return content by file name, relative to the model's folder.

    Args:
        heads: By expert.
        dtype: Of the floating tensors; ``None`` is each as it is.

    Raises:
        CheckpointError: If a tensor is not finite in that dtype.
    """
    files: dict[str, str | bytes] = {}
    for expert, head in heads.items():
        tensors = {
            name: (t.to(dtype) if dtype and t.is_floating_point() else t).contiguous()
            for name, t in head.tensors.items()
        }
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{expert!r}: {name!r} is not finite in {tensor.dtype}")
        recipe = {
            "expert": expert,
            "model_class": head.model_class,
            "pooling": head.pooling,
            "id2label": {str(i): label for i, label in enumerate(head.labels)},
        }
        file = f"{HEADS_DIR}/{_file_name(expert)}"
        files[f"{file}.safetensors"] = save(tensors, {"format": "pt"})
        files[f"{file}.json"] = json.dumps(recipe, indent=2) + "\n"
    return files


def _file_name(expert: str) -> str:
    """Return the expert's name as a name of a file, the same for no two of them."""
    return quote(expert, safe=" ")


def class_of(config: Mapping[str, Any]) -> str | None:
    """Return the ``Auto`` class of transformers for a configuration's own, with its head."""
    ending = re.search(r"For\w+$", str((config.get("architectures") or [""])[0]))
    return f"AutoModel{ending[0]}" if ending else None


def load_classifier(
    model_dir: str | Path, expert: str, *, device: str = "cpu", trust_remote_code: bool = False
) -> nn.Module:
    """Return a saved encoder with the head of one of its experts, ready for inference.

    Called with what the tokenizer or image processor in ``model_dir`` gives, it returns an
    object with ``logits``, ``(n_examples, n_classes)``; ``config.id2label`` names the classes.
    Texts may be padded with any token where ``attention_mask`` says so.

    Args:
        model_dir: A model that a study or ``searchmerge merge`` has saved.
        expert: The expert's name in the study.
        device: A torch device, e.g. ``"cpu"`` or ``"cuda:0"``.
        trust_remote_code: Whether Python files of the model may run.

    Raises:
        CheckpointError: If there is no such model or head, or they do not fit.
    """
    encoder = open_checkpoint(model_dir, trust_remote_code=trust_remote_code)
    head = _read_head(encoder.path, expert)
    where = f"{encoder.path / HEADS_DIR}: {expert!r}"
    if head.model_class is None:
        raise CheckpointError(
            f"{where} has tensors ({', '.join(head.tensors)}), and nothing says how they are used"
        )
    try:
        if head.pooling is not None:
            linear = pooled_head(head.tensors, head.pooling, where)
            model = _loaded(encoder, head, device)
            return PooledClassifier(model, linear, head.labels).to(device).eval()
        shared = [name for name in encoder.headers if name not in head.tensors]
        needed, _ = head_names(
            encoder.path, shared, head.model_class, trust_remote_code=trust_remote_code
        )
        model_head(head.tensors, needed, len(head.labels), where)
    except SpecError as error:
        raise CheckpointError(str(error)) from error
    model = _loaded(encoder, head, device)
    _write_head(model, {needed[name]: head.tensors[name] for name in needed}, where)
    if pools_by_padding(model):
        _pad_as_masked(model, encoder)
    return model


def _read_head(model_dir: Path, expert: str) -> SavedHead:
    folder = model_dir / HEADS_DIR
    saved = [str(read_json(file).get("expert")) for file in sorted(folder.glob("*.json"))]
    if expert not in saved:
        raise CheckpointError(
            f"{model_dir}: has no head of an expert {expert!r} "
            f"(there are: {', '.join(saved) or 'none'})"
        )
    file = folder / f"{_file_name(expert)}.safetensors"
    recipe = read_json(file.with_suffix(".json"))
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    names: Mapping[str, str] = recipe.get("id2label") or {}
    return SavedHead(
        tensors,
        recipe.get("model_class"),
        recipe.get("pooling"),
        tuple(names[key] for key in sorted(names, key=int)),
    )


def _loaded(encoder: Checkpoint, head: SavedHead, device: str) -> nn.Module:
    return load_resident(
        encoder,
        dtype=main_dtype(encoder),
        device=device,
        auto_class=str(head.model_class),
        loading={} if head.pooling or not head.labels else labelled(head.labels),
    )


def _pad_as_masked(model: Any, encoder: Checkpoint) -> None:
    """Let a decoder, which classifies the last token that is not padding, find padding.

    It is known by its id; what a mask hides becomes that. Where the configuration names none, it
    is what it was when the study scored it.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        trusts = encoder.trust_remote_code
        processors = Processors(encoder.tokenizer_dir, None, trust_remote_code=trusts)
        config.pad_token_id = processors.pad_token_id

    def fill(
        _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        tokens, mask = given.get("input_ids"), given.get("attention_mask")
        if tokens is None or mask is None:
            return None
        filled = tokens.masked_fill(mask == 0, config.pad_token_id)
        return args, {**given, "input_ids": filled}

    model.register_forward_pre_hook(fill, with_kwargs=True)


@torch.no_grad()
def _write_head(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    parameters = model.state_dict()
    for name, tensor in tensors.items():
        if parameters[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name!r} has shape {list(tensor.shape)}; the model needs "
                f"{list(parameters[name].shape)}"
            )
        parameters[name].copy_(tensor)

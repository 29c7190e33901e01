"""As what class of transformers a model can be loaded, and which of them read left to right."""

from typing import Any

from searchmerge.checkpoints.checkpoint import Checkpoint
from searchmerge.checkpoints.model_config import comparable_config
from searchmerge.errors import CheckpointError

CAUSAL_LM = "AutoModelForCausalLM"
LANGUAGE_MODELS = (CAUSAL_LM, "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""Classes whose models give the next token's logits, each token seeing those before it."""

_MAPPINGS = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    CAUSAL_LM: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


def is_also(auto_class: str | None, needed: str) -> bool:
    """Return whether models of a class do what those of another, which is needed, do."""
    return needed == CAUSAL_LM and auto_class in LANGUAGE_MODELS


def check_class(checkpoint: Checkpoint, auto_class: str) -> None:
    """Refuse to load a model as a class that transformers does not have for it, or that misleads.

    An encoder such as BERT can be loaded as a causal language model, where every token sees
    those after it, and an encoder-decoder too, without its encoder.

    Args:
        checkpoint: The model.
        auto_class: The class; one that is not known here is left to transformers.

    Raises:
        CheckpointError: If so; it names the classes that are possible.
    """
    kind = str(checkpoint.config.get("model_type") or "")
    config = comparable_config(
        checkpoint.config, checkpoint.path, trust_remote_code=checkpoint.trust_remote_code
    )
    possible = _classes_of(kind)
    if not possible or (checkpoint.trust_remote_code and getattr(config, "auto_map", None)):
        return
    where = f"{checkpoint.name}: is a {kind} model"
    if auto_class == CAUSAL_LM and getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{where}, an encoder-decoder, which is scored with its encoder by "
            "`model_class: AutoModelForSeq2SeqLM` and tasks of evaluator lm_harness or function"
        )
    if auto_class in _MAPPINGS and auto_class not in possible:
        raise CheckpointError(
            f"{where}, which is no {auto_class}; with `model_class:` it can be loaded as "
            f"{', '.join(possible)}"
        )
    if auto_class != CAUSAL_LM:
        return
    if _sees_what_follows(config, possible):
        raise CheckpointError(
            f"{where}, whose tokens see those that follow them; tasks of lm_harness and "
            "perplexity need a model that reads left to right. It can be merged with "
            "`model_class: AutoModelForMaskedLM` and tasks of evaluator function, or with tasks "
            "of evaluator classification"
        )


def _sees_what_follows(config: Any, possible: list[str]) -> bool:
    """Return whether this is a masked language model, and not made a decoder."""
    masked = "AutoModelForMaskedLM" in possible
    return masked and not (
        getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    )


def _classes_of(kind: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    return [name for name, table in _MAPPINGS.items() if kind in getattr(modeling_auto, table)]

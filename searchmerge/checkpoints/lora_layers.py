"""What is asked of a base's layers to merge a LoRA adapter, where no name or shape tells it."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from searchmerge.checkpoints.lora_config import SUPPORTED, AdapterConfig
from searchmerge.checkpoints.lora_experts import (
    AdaptedParameter,
    adapted_parameters,
    pairs_of_factors,
)
from searchmerge.checkpoints.renames import resident_names, transposed_weights, without_data
from searchmerge.checkpoints.tensor_files import TensorHeader
from searchmerge.errors import CheckpointError

_WITHOUT_OUTPUT = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""What an adapter is for whose model has no output over the vocabulary, whatever its base has."""


def find_name(name: str, base: Mapping[str, Any]) -> str | None:
    """Return the base's name of a tensor, with or without the name of the model in front."""
    if name in base:
        return name
    _, _, rest = name.partition(".")
    if rest in base:
        return rest
    fronts = {known.partition(".")[0] for known in base if known.endswith(f".{name}")}
    longer = [f"{front}.{name}" for front in sorted(fronts) if f"{front}.{name}" in base]
    return longer[0] if len(longer) == 1 else None


@dataclass(frozen=True)
class Layers:
    """The layers of an adapter's base.

    Attributes:
        config: The adapter's.
        base_dir: The base.
        trust_remote_code: Whether Python files of the base may run.
    """

    config: AdapterConfig
    base_dir: Path
    trust_remote_code: bool

    def parameters(
        self, file: Path, headers: Mapping[str, TensorHeader]
    ) -> list[tuple[AdaptedParameter, tuple[str, str]]]:
        """Return the parameters that the adapter changes, e.g. fused experts, with their factors.

        Raises:
            CheckpointError: If the model cannot be made that has them, or the adapter lacks a
                factor, or has settings that PEFT does not have of parameters.
        """
        settings = self.config.settings
        targets = settings.get("target_parameters") or []
        if not targets:
            return []
        odd = [key for key in ("use_dora", "lora_bias", "fan_in_fan_out") if settings.get(key)]
        if self.config.start is not None:
            odd.append("init_lora_weights")
        model = without_data(self.base_dir, trust_remote_code=self.trust_remote_code)
        if odd or model is None:
            why = f"with {odd[0]}" if odd else "of a model that transformers cannot make"
            raise CheckpointError(
                f"{self.config.file}: target_parameters is {targets!r}, {why}; {SUPPORTED}"
            )
        return pairs_of_factors(file, list(headers), adapted_parameters(model, targets))

    def bias_fields(self, module: str) -> list[str]:
        """Return the fields of the base's configuration that would give a layer a bias."""
        model = without_data(self.base_dir, trust_remote_code=self.trust_remote_code)
        fields = {} if model is None else model.config.to_dict()
        off = [key for key, value in fields.items() if "bias" in key and value is False]
        found = []
        for field in off:
            config = deepcopy(model.config)
            setattr(config, field, True)
            with torch.device("meta"):
                names = dict.fromkeys(name for name, _ in type(model)(config).named_parameters())
            if find_name(f"{module}.bias", names) is not None:
                found.append(field)
        return found

    def names(self) -> Mapping[str, str]:
        """Return names in the base's checkpoint by names in the loaded model."""
        return resident_names(self.base_dir, trust_remote_code=self.trust_remote_code)

    def are_transposed(self, name: str) -> bool:
        """Return whether the model stores a weight as ``(n_in, n_out)``.

        Where the model cannot be made, that is as the adapter says.
        """
        transposed = transposed_weights(self.base_dir, trust_remote_code=self.trust_remote_code)
        if transposed is None:
            return bool(self.config.settings.get("fan_in_fan_out"))
        return find_name(name, dict.fromkeys(transposed)) is not None

    def refuse_output_with_bias(self, file: Path, module: str) -> None:
        """Refuse trained tokens of an output that has a bias, or shares an embedding's weight.

        PEFT's layer of trained tokens has none: it computes ``x @ W.T`` while the adapter runs
        and trains, and gives back the base's layer, with its bias, where the adapter is merged.

        Raises:
            CheckpointError: If the layer is one.
        """
        mapping = self.config.settings.get("auto_mapping") or {}
        model = without_data(
            self.base_dir,
            mapping.get("base_model_class"),
            trust_remote_code=self.trust_remote_code,
        )
        output: Any = None if model is None else model.get_output_embeddings()
        if (
            getattr(output, "bias", None) is None
            or self.config.settings.get("task_type") in _WITHOUT_OUTPUT
        ):
            return
        modules = dict(model.named_modules())
        if module in modules and modules[module].weight is output.weight:
            raise CheckpointError(
                f"{file}: trains tokens of {module!r}, which the output with its bias shares; "
                "PEFT leaves that bias out until it merges the adapter, so this is two models; "
                "merge it with PEFT (merge_and_unload) and give the model that this makes"
            )

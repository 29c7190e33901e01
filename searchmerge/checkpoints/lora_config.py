"""What an adapter's configuration says of how its tensors change the base, as PEFT reads it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from searchmerge.checkpoints.files import (
    COUNT,
    NUMBER,
    PATTERNS,
    SWITCH,
    TEXT,
    TEXTS_BY_NAME,
    read_json,
)
from searchmerge.checkpoints.lora_experts import Scale
from searchmerge.checkpoints.lora_targets import NAMES, TARGET_KEYS
from searchmerge.checkpoints.lora_update import REPEATABLE_STARTS
from searchmerge.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
SUPPORTED = (
    "supported are LoRA and DoRA adapters of linear and embedding layers, and LoRA of parameters"
)
_NEEDED = {
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "layer_replication": ([],),
    "alora_invocation_tokens": ([],),
    "kasa_config": ({},),
    "monteclora_config": ({},),
    "velora_config": ({},),
    "arrow_config": ({},),
}
"""Settings under which an adapter is something else."""
_KEYS = {
    "peft_type": TEXT,
    "r": COUNT,
    "lora_alpha": NUMBER,
    "rank_pattern": PATTERNS,
    "alpha_pattern": PATTERNS,
    "use_rslora": SWITCH,
    "use_dora": SWITCH,
    "lora_bias": SWITCH,
    "target_parameters": NAMES,
    "fan_in_fan_out": SWITCH,
    "auto_mapping": TEXTS_BY_NAME,
    **TARGET_KEYS,
}
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations whose adapters are trained on a base that they have changed."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The configuration of an adapter that can be merged.

    Attributes:
        file: Where it stands, for messages.
        settings: What it holds.
    """

    file: Path
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Return the configuration of an adapter.

        Raises:
            CheckpointError: If it cannot be read, or is that of another kind of adapter.
        """
        file = directory / ADAPTER_CONFIG
        settings = read_json(file, _KEYS)
        _check_supported(file, settings)
        return cls(file, settings)

    @property
    def base_name(self) -> str:
        """Return the model that the adapter says it was trained on; empty if it says none."""
        return str(self.settings.get("base_model_name_or_path") or "")

    @property
    def start(self) -> str | None:
        """Return the initialisation, where its factors are taken from the base's weights."""
        start = _start(self.settings)
        return start if start in REPEATABLE_STARTS else None

    def scale(self, module: str) -> Scale:
        """Return the rank of a module's factors, and what their product is multiplied by.

        Raises:
            CheckpointError: If it does not say.
        """
        said = self.settings
        rank = _of_pattern(said.get("rank_pattern"), module, said.get("r"))
        alpha = _of_pattern(said.get("alpha_pattern"), module, said.get("lora_alpha"))
        if not rank or alpha is None:
            raise CheckpointError(f"{self.file}: r or lora_alpha is missing")
        return rank, alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)

    def tokens(self, module: str) -> tuple[int, ...]:
        """Return the tokens whose rows of a module's weight were trained.

        Raises:
            CheckpointError: If it does not say.
        """
        said = self.settings.get("trainable_token_indices")
        tokens = _of_pattern(said, module, None) if isinstance(said, Mapping) else said
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise CheckpointError(
                f"{self.file}: trainable_token_indices does not name the tokens of "
                f"{module!r}, whose rows the adapter holds"
            )
        return tuple(tokens)


def _check_supported(file: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type is {kind!r}; {SUPPORTED}")
    for key, allowed in _NEEDED.items():
        found = settings.get(key)
        if found is not None and found not in allowed:
            raise CheckpointError(f"{file}: {key} is {found!r}; {SUPPORTED}")
    start = _start(settings)
    if start.startswith(_CHANGES_BASE) and start not in REPEATABLE_STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, so the adapter belongs to a base that its "
            "training has changed, in a way that cannot be repeated; convert it to a plain LoRA "
            "when saving it with PEFT (path_initial_model_for_weight_conversion)"
        )


def _start(settings: Mapping[str, Any]) -> str:
    return str(settings.get("init_lora_weights")).lower()


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that ends the module's name, as PEFT matches it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default

"""Models of the Hugging Face hub, fetched into its own cache."""

import re
from collections.abc import Sequence
from pathlib import Path

from searchmerge.checkpoints.companions import module_folders
from searchmerge.checkpoints.files import COMPANIONS
from searchmerge.errors import CheckpointError

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*adapter_config.json")
_TORCH_WEIGHTS = ("*.bin", "*.bin.index.json")
"""Fetched only where there are no others."""
_DUPLICATES = ("consolidated*", "original/*", "onnx/*", "openvino/*", "training_args.bin")
"""The same weights once more, in formats that are not read here."""


def is_hub_id(source: str) -> bool:
    """Return whether ``source`` has the form ``organisation/name``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None


def fetch(source: str, revision: str | None) -> Path:
    """Download a model's weights, configuration and tokenizer; return its local directory.

    What is in the hub's cache already is not downloaded again.

    Args:
        source: ``organisation/name``.
        revision: A branch, tag or commit; ``None`` is the main branch.

    Raises:
        CheckpointError: If the model or its revision does not exist, is not allowed to this
            user, or the hub cannot be reached and the cache does not hold it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RevisionResolutionError,
        XetDownloadError,
    )

    failures: tuple[type[BaseException], ...] = (
        *HfHubHTTPError.__bases__,  # OSError, and HTTPError of the library that it uses now
        ValueError,
        EntryNotFoundError,
        RevisionResolutionError,
        XetDownloadError,
    )
    wanted = [*COMPANIONS, *_WEIGHTS]

    def download(patterns: Sequence[str]) -> Path:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(_DUPLICATES),
            )
        )

    try:
        directory = download(wanted)
        if not any(directory.rglob("*.safetensors")):
            directory = download([*wanted, *_TORCH_WEIGHTS])
        if folders := module_folders(directory):
            directory = download([f"{folder}/*" for folder in folders])
    except failures as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{source!r}{at} is no local directory, and could not be fetched from the "
            f"Hugging Face hub: {reason}"
        ) from error
    return directory

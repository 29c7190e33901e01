"""The base's tokenizer and configuration, as the evaluators load them."""

from pathlib import Path
from typing import Any

from searchmerge.errors import SpecError


def load_tokenizer(model_dir: str | Path, *, add_bos_token: bool | None = None) -> Any:
    """Return the tokenizer of a model, from files that are on this machine.

    Args:
        model_dir: The directory of its files.
        add_bos_token: Whether it puts the token that begins a text before one; as its files say
            if ``None``.

    Raises:
        SpecError: If it cannot be loaded, or knows no tokens but special ones: where the files of
            a tokenizer are missing, transformers makes one up that knows no word.
    """
    from transformers import AutoTokenizer

    try:
        options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        tokenizer = AutoTokenizer.from_pretrained(model_dir, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"{model_dir}: the tokenizer cannot be loaded: {reason}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise SpecError(
            f"{model_dir}: the tokenizer has {len(tokenizer)} tokens, all of them special; its "
            "files (e.g. tokenizer.json) are missing there"
        )
    return tokenizer


def load_config(model_dir: str | Path) -> Any:
    """Return the configuration of a model, or ``None`` where its directory has none to load."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_dir)
    except (OSError, ValueError):
        return None

"""The base's tokenizer, as the evaluators load it."""

from pathlib import Path
from typing import Any

from searchmerge.checkpoints.model_config import in_one_line
from searchmerge.errors import SpecError


def load_tokenizer(model_dir: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model, from files that are on this machine.

    Args:
        model_dir: The directory of its files.
        trust_remote_code: Whether Python files of the model may run.

    Raises:
        SpecError: If it cannot be loaded, or knows no tokens but special ones: where the files of
            a tokenizer are missing, transformers makes one up that knows no word.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise SpecError(
            f"{model_dir}: the tokenizer cannot be loaded: {in_one_line(error)}"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise SpecError(
            f"{model_dir}: the tokenizer has {len(tokenizer)} tokens, all of them special; its "
            "files (e.g. tokenizer.json) are missing there"
        )
    return tokenizer

"""The base's tokenizer and configuration, as the evaluators load them."""

import json
from pathlib import Path
from typing import Any

from searchmerge.checkpoints.files import in_one_line
from searchmerge.errors import SpecError

_SETTINGS = "tokenizer_config.json"
_VOCABULARY = "tokenizer.json"


def load_tokenizer(
    model_dir: str | Path, *, trust_remote_code: bool = False, add_bos_token: bool | None = None
) -> Any:
    """Return the tokenizer of a model, from files that are on this machine.

    Args:
        model_dir: The directory of its files.
        trust_remote_code: Whether Python files of the model may run.
        add_bos_token: Whether it puts the token that begins a text before one; as its files say
            if ``None``.

    Raises:
        SpecError: If it cannot be loaded, or knows no tokens but special ones: where the files of
            a tokenizer are missing, transformers makes one up that knows no word.
    """
    from transformers import AutoTokenizer

    try:
        options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # odd values lead transformers to any, and tokenizers to bare ones
        reason = in_one_line(error)
        where = _odd_file(Path(model_dir))
        raise SpecError(f"{where}: the tokenizer cannot be loaded: {reason}") from error
    if not isinstance(tokenizer.model_max_length, int | float):
        raise SpecError(
            f"{Path(model_dir) / _SETTINGS}: model_max_length is {tokenizer.model_max_length!r}; "
            "a number is needed"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise SpecError(
            f"{model_dir}: the tokenizer has {len(tokenizer)} tokens, all of them special; its "
            "files (e.g. tokenizer.json) are missing there"
        )
    return tokenizer


def load_config(model_dir: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a model, or ``None`` where its directory has none to load."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None


def _odd_file(model_dir: Path) -> Path:
    """Return the file for which a tokenizer cannot be loaded, as far as that can be told."""
    from tokenizers import Tokenizer

    for name in (_SETTINGS, "special_tokens_map.json", "added_tokens.json", _VOCABULARY):
        file = model_dir / name
        if not file.is_file():
            continue
        try:
            is_object = isinstance(json.loads(file.read_bytes()), dict)
            if name == _VOCABULARY:
                Tokenizer.from_file(str(file))
        except Exception:  # noqa: BLE001 - what is wrong with it was told already
            return file
        if not is_object:
            return file
    return model_dir / _SETTINGS if (model_dir / _SETTINGS).is_file() else model_dir

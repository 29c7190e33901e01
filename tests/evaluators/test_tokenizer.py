"""The base's tokenizer is loaded from its files, and not made up."""

import pytest

from searchmerge.errors import SpecError
from searchmerge.evaluators.tokenizer import load_tokenizer
from tests.tiny import make_models, save_tokenizer


def test_a_tokenizer_is_what_was_saved(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("w3 is a", add_special_tokens=False) == [5, 62, 63]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(SpecError, match=f"{tmp_path.name}: the tokenizer cannot be loaded: \\S"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_knows_no_word_is_refused(tmp_path):
    """As transformers makes one up for a model whose tokenizer files are missing."""
    make_models(tmp_path)
    for file in (tmp_path / "base").glob("*token*"):
        file.unlink()
    with pytest.raises(
        SpecError, match=r"the tokenizer (has \d+ tokens, all of|cannot be loaded)"
    ):
        load_tokenizer(tmp_path / "base")


def test_a_tokenizer_of_special_tokens_alone_is_refused(tmp_path):
    save_tokenizer(tmp_path, words=["<s>", "</s>"])
    with pytest.raises(SpecError, match="has 2 tokens, all of them special; its files"):
        load_tokenizer(tmp_path)

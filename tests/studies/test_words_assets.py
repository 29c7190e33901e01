"""What the words study is made of: its rows, who sees which, and what a model learns from them."""

import pytest
import yaml

from studies.words import prepare
from studies.words.prepare import IGNORED, TASKS, batch_of, make_tokenizer, rows_of

LINES = ["banana B AH0 N AE1 N AH0", "read R EH1 D", "read(2) R IY1 D # of now", "o'er AO1 R"]


class Words:
    """Dictionaries of made-up words."""

    def __init__(self):
        words = [f"{a}{b}{c}" for a in "bcd" for b in "aeiou" for c in "lmn"]
        self.phones = dict.fromkeys(words, ("B", "AH0", "N", "AE1"))
        self.corrections = {f"{word}x": word for word in words}


def test_of_a_word_the_first_pronunciation_counts():
    phones = dict(prepare.pronounced(line) for line in reversed(LINES))
    assert phones["read"] == ("R", "EH1", "D")
    assert prepare.sound(phones["banana"]) == "bʌnænʌ"
    assert prepare.stress(phones["banana"]) == "010"
    assert [word for word in phones if prepare.is_plain(word)] == ["read", "banana"]


@pytest.mark.parametrize("task", TASKS)
def test_an_expert_is_trained_on_no_word_that_any_task_studies(task):
    dictionaries = Words()
    studied, trained = rows_of(task, dictionaries)
    assert studied
    assert len(studied) + len(trained) == len(dictionaries.phones)
    words = {
        prepare.word_of(other, row) for other in TASKS for row in rows_of(other, dictionaries)[0]
    }
    assert not words & {prepare.word_of(task, row) for row in trained}


def test_every_character_is_a_token_and_comes_back():
    tokenizer = make_tokenizer()
    text = "sound strength = stɹɛŋkθ\n"
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text)
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens) == text


def test_only_answers_are_learnt():
    tokenizer = make_tokenizer()
    tokens, labels = batch_of(tokenizer, [("stress", "banana", "010"), ("sound", "bat", "bæt")])
    learnt = [tokenizer.decode(row[row != IGNORED]) for row in labels]
    assert learnt == [" 010\n", " bæt\n"]
    assert tokenizer.decode(tokens[0]) == "stress banana = 010\n"


@pytest.mark.parametrize("task", TASKS)
def test_a_task_asks_as_its_expert_was_taught(task):
    file = prepare.HERE / "tasks" / f"{task}.yaml"
    told = yaml.safe_load(file.read_text())
    assert told["task"] == f"words_{task}"
    assert told["dataset_kwargs"]["data_files"]["validation"] == f"../models/data/{task}.jsonl"
    assert told["target_delimiter"] == " "
    assert told["generation_kwargs"]["until"] == ["\n"]

"""A row ends at an end token or a stop sequence, and says nothing after it."""

import pytest
import torch

from searchmerge.evaluators.causal.stopping import (
    NOT_FINITE,
    NonFiniteLogits,
    Said,
    StopSequences,
)
from tests.evaluators.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
NO_STOPS = StopSequences(TOKENIZER, (), 0)


def tokens(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_a_stop_sequence_is_met_in_the_last_tokens_alone():
    stops = StopSequences(TOKENIZER, ("", "lazy dog"), 0)
    assert stops.met(tokens("the lazy dog"))
    assert not stops.met(tokens("the lazy"))
    assert not stops.met(tokens("the lazy dog") + tokens(" the quick brown fox jumps over a fox"))
    assert not NO_STOPS.met(tokens("the lazy dog"))


def test_a_stop_sequence_of_the_prompt_stops_no_row():
    prompt, said = tokens("the lazy dog"), [tokens(" is a fox"), tokens(" is lazy dog")]
    width = min(map(len, said))
    rows = torch.tensor([prompt + new[-width:] for new in said])
    stops = StopSequences(TOKENIZER, ("lazy dog",), len(prompt))
    assert stops(rows, None).tolist() == [False, True]


def test_a_row_says_its_end_and_nothing_after_it():
    said = Said([0, 1], [9], NO_STOPS)
    for step in ([5, 9], [9, 6], [7, 7]):
        said.add(step)
    assert said.tokens == [[5, 9], [9]]
    assert said.left() == []


def test_rows_that_leave_are_given_no_more_and_the_others_keep_their_own():
    said = Said([0, 1, 2], [9], NO_STOPS)
    said.add([9, 5, 6])
    assert said.left() == [1, 2]
    said.keep(said.left())
    said.add([7, 9])
    assert (said.n_rows, said.left()) == (2, [0])
    said.keep(said.left())
    said.add([8])
    assert said.tokens == [[9], [5, 7, 8], [6, 9]]


def test_a_token_that_could_not_be_chosen_names_its_prompt_unless_the_row_was_done():
    said = Said([40, 41, 42], [9], NO_STOPS)
    said.add([9, 5, 5])
    said.add([NOT_FINITE, 6, 6])
    said.keep([1, 2])
    with pytest.raises(NonFiniteLogits, match="logits of prompt 42 are not finite") as caught:
        said.add([6, NOT_FINITE])
    assert caught.value.row == 42

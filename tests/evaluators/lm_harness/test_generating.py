"""Requests are generated as their arguments say, from seeds of their own."""

import pytest

from searchmerge.errors import SpecError
from searchmerge.evaluators.lm_harness.generating import (
    by_options,
    options_of,
    room_for_prompt,
    seeds_of,
)
from searchmerge.evaluators.lm_harness.keys import LmTask
from tests.evaluators.lm_harness.tasks import harness, instances
from tests.evaluators.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def test_a_continuation_ends_at_its_stop_sequences_and_at_the_end_of_text():
    options = options_of({"until": ["the", "\n"], "max_gen_toks": 8}, TOKENIZER)
    assert options.stop == ("the", "\n", TOKENIZER.eos_token)
    assert (options.max_new_tokens, options.seeds) == (8, ())
    assert options_of({}, TOKENIZER).stop == (TOKENIZER.eos_token,)
    assert options_of({}, TOKENIZER).max_new_tokens == 256


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"temperature": 0.0}, False),
        ({"do_sample": False, "temperature": 0.0}, False),
        ({"do_sample": True, "temperature": 0.7}, True),
    ],
)
def test_a_temperature_of_zero_asks_for_the_likeliest_and_is_none(arguments, kept):
    assert ("temperature" in options_of(arguments, TOKENIZER).arguments) == kept


def test_arguments_are_left_as_they_were():
    arguments = {"until": ["the"], "max_gen_toks": 8, "temperature": 0.0}
    before = {**arguments, "until": [*arguments["until"]]}
    options_of(arguments, TOKENIZER)
    assert arguments == before


def test_requests_of_one_way_are_generated_together():
    few, many = {"max_gen_toks": 4}, {"max_gen_toks": 9}
    requests = instances("generate_until", [("a", few), ("b", many), ("c", dict(few))])
    told = {
        options.max_new_tokens: members for options, members in by_options(requests, TOKENIZER)
    }
    assert told == {4: [0, 2], 9: [1]}


def test_a_request_that_is_answered_again_has_another_seed_whatever_stands_beside_it():
    first, second = instances("generate_until", [("a", {}), ("b", {})])
    seeds = seeds_of([first, first, second], 3)
    assert len(set(seeds)) == 3
    assert seeds_of([second, first, first], 3) == [seeds[2], *seeds[:2]]
    assert not set(seeds_of([first, first, second], 4)) & set(seeds)


def test_what_is_generated_leaves_room_for_a_token_of_the_prompt():
    assert room_for_prompt(8, 9) == 1
    with pytest.raises(SpecError, match="9 tokens are to be generated; allowed are up to 8, the"):
        room_for_prompt(9, 9)


def test_a_generation_longer_than_the_window_is_refused(folder, model):
    evaluator = harness(folder, LmTask("generate", "test"), max_length=8)
    with pytest.raises(SpecError, match="8 tokens are to be generated; allowed are up to 7"):
        evaluator.score(model, "mine", [0])

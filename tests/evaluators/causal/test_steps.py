"""The likeliest token is chosen, of finite logits, for the rows that are left."""

import pytest
import torch

from searchmerge.evaluators.causal.steps import Begun, choice, next_logits
from searchmerge.evaluators.causal.stopping import NOT_FINITE
from tests.evaluators.models import tiny_model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_likeliest_token_is_chosen_and_told_where_logits_are_finite(value):
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, value], [3.0, -float("inf"), 0.0]])
    chosen, told = choice(logits)
    assert told.tolist() == [1, NOT_FINITE, 0]
    assert chosen[[0, 2]].tolist() == [1, 0]
    assert 0 <= int(chosen[1]) < 3  # a token all the same: the next step is run with it


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_logits_are_those_of_the_last_token_of_every_row(architecture):
    model, rows = tiny_model(architecture), torch.tensor([[5, 9, 30], [7, 8, 8]])
    with torch.no_grad():
        expected = model(input_ids=rows).logits[:, -1]
        torch.testing.assert_close(next_logits(model, input_ids=rows), expected)


def test_some_rows_keep_all_that_is_theirs_and_a_layer_without_a_cache_has_none():
    numbers = torch.arange(3)
    past = [(numbers.view(3, 1, 1, 1), numbers.view(3, 1, 1, 1) + 10), None]
    begun = Begun(numbers[:, None], numbers[:, None] + 20, numbers[:, None] + 30, past)
    some = begun.some(torch.tensor([2, 0]))
    assert some.tokens.flatten().tolist() == [2, 0]
    assert some.positions.flatten().tolist() == [22, 20]
    assert some.mask.flatten().tolist() == [32, 30]
    assert [tensor.flatten().tolist() for tensor in some.past[0]] == [[2, 0], [12, 10]]
    assert some.past[1] is None

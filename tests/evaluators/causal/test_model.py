"""What is asked of a causal model itself: its arguments, and prefixes that it has run."""

import pytest
import torch
from torch import nn

from searchmerge.evaluators.causal.model import Prefix, device_of, run_prefix, takes
from tests.evaluators.models import tiny_model


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_rows_that_go_on_from_a_prefix_are_as_if_it_stood_in_each(architecture):
    model = tiny_model(architecture)
    shared, tails = (5, 9, 17, 40), torch.tensor([[7, 8], [30, 2], [1, 1]])
    prefix = run_prefix(model, shared)
    assert prefix.n_tokens == 4
    whole = torch.cat([torch.tensor([shared]).expand(3, -1), tails], 1)
    expected = model(whole).logits[:, 4:]
    for _ in range(2):  # what a pass adds is not in the prefix
        found = model(
            tails,
            past_key_values=prefix.rows(3),
            position_ids=torch.tensor([[4, 5]]).expand(3, -1),
            use_cache=True,
        ).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_empty_prefix_is_not_run():
    ran = []
    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda *_: ran.append(True))
    assert run_prefix(model, ()) == Prefix()
    assert Prefix().rows(3).get_seq_length() == 0
    assert ran == []


def test_a_models_arguments_are_those_of_its_forward_pass():
    model = tiny_model("llama")
    assert takes(model, "logits_to_keep")
    assert takes(model, "position_ids")
    assert not takes(model, "langauge")
    assert not takes(nn.Linear(2, 2), "logits_to_keep")


def test_a_model_is_where_its_parameters_are():
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")

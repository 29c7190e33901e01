"""Activations that are computed again give the gradient that those kept give."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, OPTConfig, OPTForCausalLM

from searchmerge.evaluators.activations import recomputed_activations
from searchmerge.evaluators.causal.scoring import CausalScorer
from tests.evaluators.classifiers import BERT
from tests.evaluators.models import tiny_model

PREFIX = tuple(range(2, 12))
PAIRS = [((*PREFIX, k), (k + 1, k + 2)) for k in range(20, 28)]


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**BERT)).eval()


def of_states(model):
    states = model(input_ids=torch.arange(12).reshape(2, 6)).last_hidden_state
    return (states * torch.linspace(-1, 1, states.shape[-1])).sum()


def of_rows(model):
    return CausalScorer(64).log_likelihoods(model, PAIRS, 64).sum()


def gradients(model, loss):
    model.zero_grad()
    loss(model).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("make", "loss"), [(bert, of_states), (lambda: tiny_model("llama").eval(), of_rows)]
)
def test_gradients_stay_what_they_are_and_layers_are_run_twice(make, loss):
    model = make()
    expected = gradients(model, loss)
    runs = []
    norm = next(m for m in model.modules() if "Attention" in type(m).__name__)
    handle = norm.register_forward_hook(lambda *_: runs.append(None))
    with recomputed_activations(model) as can:
        assert can
        loss(model)
        once = len(runs)
        given = gradients(model, loss)
    assert len(runs) == 3 * once
    handle.remove()
    for grad, other in zip(given, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-3)
    assert not any(module.training for module in model.modules())
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        OPTForCausalLM(
            OPTConfig(
                vocab_size=32,
                hidden_size=8,
                ffn_dim=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                word_embed_proj_dim=8,
            )
        ).eval(),
    ],
    ids=["no layers of transformers", "layers that drop activations"],
)
def test_a_model_that_cannot_do_it_stays_as_it_is(model):
    with recomputed_activations(model) as can:
        assert not can
        assert not model.training or isinstance(model, nn.Linear)

"""Tokens are drawn from the distribution that transformers draws from, by numbers of their own."""

import numpy as np
import pytest
import torch

from searchmerge.evaluators.causal.sampling import Draws, seed_of, setting, warpers
from tests.evaluators.models import tiny_model

PROMPT = torch.tensor([[5, 9, 30]])
ARGUMENTS = [
    {},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.4, "top_k": 7},
    {"top_k": None, "min_p": 0.05},
    {"top_k": 0, "typical_p": 0.6},
    {"top_k": 0, "eta_cutoff": 0.02, "epsilon_cutoff": 0.01},
    {"top_h": 0.5},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("config", [{}, {"temperature": 0.4, "top_k": 4, "top_p": 0.9}])
def test_logits_are_warped_as_in_transformers(arguments, config):
    model = tiny_model("llama")
    model.generation_config.update(**config)
    with torch.no_grad():
        logits = model(PROMPT).logits[:, -1]
    told = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 1}
    expected = model.generate(PROMPT, do_sample=True, **told, **arguments).scores[0]
    found = warpers(model, arguments, logits.device)(PROMPT, logits)
    torch.testing.assert_close(found, expected)


def test_a_call_comes_before_the_models_generation_config():
    model = tiny_model("llama")
    assert setting(model, {}, "top_k") == 50
    model.generation_config.top_k = 7
    assert setting(model, {}, "top_k") == 7
    assert setting(model, {"top_k": None}, "top_k") is None


def test_tokens_are_drawn_as_often_as_they_are_likely():
    n_rows = 4000
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    draws = Draws(lambda _, scores: scores, range(n_rows), n_prompt=3, n_steps=2)
    for step in range(2):
        tokens = torch.zeros(n_rows, 3 + step, dtype=torch.int64)
        chosen = draws(tokens, probabilities.log().expand(n_rows, -1))
        assert (chosen.isfinite().sum(-1) == 1).all()
        counts = torch.bincount(chosen.argmax(-1), minlength=6).numpy()
        expected = probabilities.numpy() * n_rows
        assert (counts[expected == 0] == 0).all()
        possible = expected > 0
        chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        assert chi_square < 16.3  # 3 degrees of freedom, 1 in 1000


def test_seeds_are_those_of_what_is_drawn():
    seeds = [seed_of(1234, "task", example, 0, turn) for example in range(50) for turn in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1234, "task", 3, 0, 1) == seeds[3 * 4 + 1]
    assert np.unique([seed_of(1, "a", "b"), seed_of(1, "a'b"), seed_of(1, "ab", "")]).size == 3

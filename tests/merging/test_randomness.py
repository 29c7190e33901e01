"""Draws are uniform, independent, and decided by names and places alone."""

import torch

from searchmerge.merging.randomness import N_DRAWS, draw, keep_drawn, random_keys
from tests.merging import oracles


def test_draws_are_uniform_and_do_not_go_together():
    position = torch.arange(1 << 20)
    rows = [
        draw(position, random_keys(seed, ("one", "two"), name)[i]).double() / N_DRAWS - 0.5
        for seed in (0, 1)
        for name in ("a", "b")
        for i in (0, 1)
    ]
    columns = torch.stack([*rows, *(own.roll(lag) for own in rows[:2] for lag in (1, 2, 64, 576))])
    correlations = torch.corrcoef(columns) - torch.eye(len(columns))
    assert correlations.abs().max() < 6 / len(position) ** 0.5
    for own in rows:
        counts = torch.histc(own, 256, -0.5, 0.5)
        expected = len(position) / 256
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert 150 < chi2 < 380  # 255 degrees of freedom, +- 5 standard deviations
        pairs = torch.histc(
            (own[1:] + 0.5) * 16 // 1 * 16 + (own[:-1] + 0.5) * 16 // 1, 256, 0, 256
        )
        chi2 = ((pairs - expected) ** 2 / expected).sum()
        assert 150 < chi2 < 380


def test_draws_far_into_a_parameter_differ_from_those_at_its_start():
    key = random_keys(3, ("one",), "a")[0]
    near, far = torch.arange(1000), torch.arange(1000) + (1 << 32)
    assert (draw(near, key) == draw(far, key)).sum() < 5


def test_an_entry_is_kept_if_its_draw_is_below_the_limit():
    key, position = random_keys(0, ("one",), "a")[0], torch.arange(5000)
    limit = draw(position, key)[7]
    kept = keep_drawn(torch.ones(5000), position, key, limit.float())
    assert torch.equal(kept != 0, draw(position, key) < limit)
    assert kept[7] == 0


def test_draws_are_those_of_the_oracle():
    keys = random_keys(5, ("one", "two"), "a")
    for key, expert in zip(keys, ("one", "two"), strict=True):
        found = draw(torch.arange(100), key)
        assert found.tolist() == oracles.draws(5, expert, "a", 100).tolist()

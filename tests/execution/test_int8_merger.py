"""Candidates scored with their linear layers in int8."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file
from torch import nn

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.errors import SpecError
from searchmerge.execution.int8_merger import Int8Merger, linear_weights, round_to_int8
from searchmerge.models import open_models
from searchmerge.run import run_study
from searchmerge.search.references import reference_plans
from searchmerge.study import read_study
from tests.evaluators.models import tiny_model
from tests.search.conftest import Recorder
from tests.tiny import make_models, make_study

CONFIG = RunConfig(engine="eager", device="cpu")


NUMBERS = st.floats(-100, 100, width=32).map(lambda x: x if abs(x) > 1e-20 else 0.0)


@settings(deadline=None)
@given(arrays.arrays("float32", (3, 5), elements=NUMBERS))  # no scale below float32's normal range
def test_rounding_is_to_the_nearest_of_255_levels_a_row(values):
    weight, found = torch.tensor(values).double(), torch.tensor(values)
    round_to_int8(found)
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert ((found - weight).abs() <= scale * (0.5 + 1e-4) + 1e-40).all()
    steps = (found / scale.clamp_min(1e-40)).double()
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert steps.abs().max() <= 127.001
    torch.testing.assert_close(found.abs().amax(1), weight.abs().amax(1).float())


def test_bfloat16_holds_the_level_rounded_once():
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = weight.float()
    scale = wide.abs().amax(1, keepdim=True) / 127
    expected = ((wide / scale).round() * scale).bfloat16()
    round_to_int8(weight)
    assert torch.equal(weight, expected)


def test_a_row_that_is_not_finite_becomes_nan():
    weight = torch.tensor([[1.0, float("inf")], [1.0, 2.0]])
    round_to_int8(weight)
    assert weight[0].isnan().any()
    assert weight[1].isfinite().all()


@pytest.mark.parametrize(("architecture", "n_layers"), [("llama", 14), ("gpt2", 8)])
def test_linear_layers_are_found_and_embeddings_are_not(architecture, n_layers):
    model = tiny_model(architecture)
    weights = list(linear_weights(model))
    assert len(weights) == n_layers
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert all(w.data_ptr() != embeddings.weight.data_ptr() for w in weights)
    if architecture == "gpt2":  # its layers hold (inputs, outputs)
        assert {tuple(weight.shape) for weight in weights} >= {(96, 32), (128, 32)}


class Writes:
    """A merger that writes a plan's number into one tensor."""

    def __init__(self, weight):
        self.weight = weight

    def apply(self, plan):
        self.weight.copy_(torch.arange(12.0).view(3, 4) * plan)


def test_merged_weights_are_rounded_every_time_and_others_once():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    merged = model[0].weight.detach()
    merger = Int8Merger(Writes(merged), model, [merged])
    other = model[1].weight.detach().clone()
    merger.apply(1.0)
    first = merged.clone()
    assert not torch.equal(first, torch.arange(12.0).view(3, 4))
    merger.apply(3.0)
    merger.apply(1.0)
    assert torch.equal(merged, first)
    assert torch.equal(model[1].weight, other)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(SpecError, match="int8 rounds linear layers; Embedding has none"):
        Int8Merger(Writes(torch.ones(3, 4)), nn.Embedding(3, 4), [])


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path / "cache"))
    make_models(tmp_path)
    return lambda **changes: read_study(make_study(tmp_path, **changes))


def test_a_study_scores_in_int8_and_saves_what_is_not_rounded(read, tmp_path):
    results = {}
    texts = {"texts": {"evaluator": "perplexity", "data": "texts.txt"}}
    (tmp_path / "texts.txt").write_text("".join(f"w{i} is a w{2 * i % 60}\n" for i in range(24)))
    for scoring in ("dtype", "int8"):
        study = read(scoring=scoring, tasks=texts)
        results[scoring] = run_study(study, CONFIG, tmp_path / scoring, Recorder())
    plain, rounded = ({r.name: r.select["texts"] for r in results[s].rows} for s in results)
    common = plain.keys() & rounded.keys()
    assert all(plain[name] != rounded[name] for name in common)
    assert all(abs(plain[name] - rounded[name]) < 0.1 for name in common)
    saved = load_file(tmp_path / "int8" / "model" / "model.safetensors")
    for name, tensor in saved.items():
        if "proj" in name:
            again = tensor.clone()
            round_to_int8(again)
            assert not torch.equal(again, tensor)


def test_the_same_plan_scores_the_same_after_others(read, tmp_path):
    (tmp_path / "texts.txt").write_text("".join(f"w{i} is a w{2 * i % 60}\n" for i in range(24)))
    texts = {"texts": {"evaluator": "perplexity", "data": "texts.txt"}}
    study = read(
        scoring="int8", dtype="bfloat16", tasks=texts, exclude=[r"layers\.0\.mlp\.up_proj"]
    )
    worker = assemble.make_worker(study, open_models(study), CONFIG)
    rounds = assemble.make_schedule(study, worker.tasks()).rounds["pilot"]
    plans = reference_plans(study.experts)
    first = [result.scores for result in worker.score(plans["average"], rounds)]
    list(worker.score(plans["expert first"], rounds))
    assert [result.scores for result in worker.score(plans["average"], rounds)] == first


def test_the_choice_is_part_of_the_fingerprint(read):
    plain, rounded = read().spec.canonical(), read(scoring="int8").spec.canonical()
    assert plain != rounded

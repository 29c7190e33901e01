"""Layers that an adapter's file holds and its configuration does not select."""

import json
import warnings

import peft
import pytest
import torch

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.lora_targets import selects
from searchmerge.errors import CheckpointError
from tests.checkpoints.conftest import ARCHITECTURES
from tests.checkpoints.test_lora import merged, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

_ALL = ["q_proj", "v_proj", "down_proj", "lm_head"]
_SELECTIONS = {
    "fewer names": {"target_modules": ["q_proj"]},
    "whole names": {"target_modules": ["model.layers.1.self_attn.q_proj", "v_proj"]},
    "an expression": {"target_modules": r".*layers\.1\..*_proj"},
    "linear layers": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": 0},
    "a list of layers": {"layers_to_transform": [1]},
    "no list of layers": {"layers_to_transform": [], "exclude_modules": ["lm_head"]},
    "layers by pattern": {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "whole names beside layers": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "excluded names": {"exclude_modules": ["v_proj"]},
    "an excluded expression": {"exclude_modules": r"model\.layers\.0\..*"},
}


def rewrite(directory, **settings):
    """Change an adapter's configuration."""
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("case", _SELECTIONS)
def test_an_adapter_is_put_on_the_layers_that_peft_puts_it_on(
    case, opened, tmp_path, cache_dir, caplog
):
    train("llama", tmp_path, target_modules=_ALL, use_dora=True)
    rewrite(tmp_path, **_SELECTIONS[case])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(ARCHITECTURES["llama"].make(), tmp_path)
        expected = merged(model)
    base = opened("llama")
    weights = open_checkpoint(tmp_path, base=base, cache_dir=cache_dir).weights()
    assert any(not torch.equal(weights[name], base.weights()[name]) for name in weights)
    assert [n for n in weights if not torch.equal(weights[n], expected[n])] == []
    assert "holds layers that adapter_config.json does not select" in caplog.text
    assert "they are left out, as PEFT does" in caplog.text


def test_biases_inside_of_layers_that_are_not_selected_are_left_out_too(
    opened, tmp_path, cache_dir
):
    settings = {"bias": "lora_only", "fan_in_fan_out": True}
    train("gpt2", tmp_path, target_modules=["c_attn", "c_fc"], **settings)
    rewrite(tmp_path, target_modules=["c_fc"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(ARCHITECTURES["gpt2"].make(), tmp_path)
        expected = merged(model)
    weights = open_checkpoint(tmp_path, base=opened("gpt2"), cache_dir=cache_dir).weights()
    assert [n for n in weights if not torch.equal(weights[n], expected[n])] == []


def test_modules_that_were_saved_whole_are_not_selected():
    config = {"target_modules": ["dense", "query"], "modules_to_save": ["classifier"]}
    assert selects(config, "roberta.encoder.layer.0.output.dense")
    assert not selects(config, "classifier.dense")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["o_proj"]}, r"safetensors: holds layers that .* it selects none of"),
        ({"target_modules": None}, r"config\.json: target_modules is missing; name .*'down_proj'"),
        ({"target_modules": "("}, r"target_modules is '\('; a list of names, or a regular"),
        ({"layers_to_transform": "1"}, r"layers_to_transform is '1'; a whole number from 0, or"),
        ({"layers_pattern": ["("]}, r"layers_pattern is \['\('\]; a regular expression, or a l"),
    ],
)
def test_a_selection_of_nothing_or_of_another_kind_is_refused(
    settings, message, opened, tmp_path, cache_dir
):
    train("llama", tmp_path)
    rewrite(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, base=opened("llama"), cache_dir=cache_dir)

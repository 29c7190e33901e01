"""An adapter's configuration says what PEFT reads in it, or is refused by name."""

import json

import peft
import pytest

from searchmerge.checkpoints.lora_config import AdapterConfig
from searchmerge.errors import CheckpointError
from tests.checkpoints.conftest import ARCHITECTURES

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}


@pytest.fixture
def read(tmp_path):
    def read(**said):
        (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | said))
        return AdapterConfig.read(tmp_path)

    return read


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"peft_type": "LOHA"},
            "peft_type is 'LOHA'; supported are LoRA and DoRA adapters of lin",
        ),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'; supported are"),
        ({"peft_type": None}, "peft_type is None; supported are"),
        ({"use_qalora": True}, "use_qalora is True; supported are"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', so the"),
        (
            {"init_lora_weights": "corda"},
            "init_lora_weights is 'corda', so the adapter belongs to",
        ),
        (
            {"init_lora_weights": "loftq"},
            "init_lora_weights is 'loftq', so the adapter belongs to",
        ),
        ({"init_lora_weights": "lora_ga"}, ".* cannot be repeated; convert it to a plain LoRA"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern is .*expression is needed"),
        ({"auto_mapping": "x"}, "auto_mapping is 'x'; an object of texts"),
        ({"auto_mapping": {"base_model_class": 5}}, "auto_mapping is"),
    ],
)
def test_what_is_not_a_plain_lora_or_is_garbage_is_refused(said, message, read):
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {message}"):
        read(**said)


@pytest.mark.parametrize(
    ("said", "start"),
    [
        ({}, None),
        ({"init_lora_weights": True}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"init_lora_weights": "PiSSA"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
)
def test_a_start_that_changes_the_base_is_told(said, start, read):
    assert read(**said).start == start


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scalings_are_those_of_peft(use_rslora, read):
    said = {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.down_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 32, "down_proj": 1},
        "use_rslora": use_rslora,
    }
    settings = {key: value for key, value in (PLAIN | said).items() if key != "peft_type"}
    model = peft.get_peft_model(ARCHITECTURES["llama"].make(), peft.LoraConfig(**settings))
    config = read(**said)
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert len(set(expected.values())) > 3
    assert {name: config.scale(name) for name in expected} == expected


def test_a_missing_rank_or_alpha_is_named(read):
    for key in ("r", "lora_alpha"):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json: r or lora_alpha is mis"):
            read(**{key: None}).scale("model.layers.0.self_attn.q_proj")


def test_trained_tokens_are_those_of_the_embedding_or_of_the_module_that_is_named(read):
    assert read(trainable_token_indices=[3, 7]).tokens("model.embed_tokens") == (3, 7)
    by_name = read(trainable_token_indices={"lm_head": [3], "embed_tokens": [5]})
    assert by_name.tokens("lm_head") == (3,)
    assert by_name.tokens("model.embed_tokens") == (5,)
    with pytest.raises(CheckpointError, match=r"does not name the tokens of 'model\.wte'"):
        by_name.tokens("model.wte")

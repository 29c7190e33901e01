"""Adapters on parameters that hold several experts are merged as PEFT merges them."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from searchmerge.checkpoints.checkpoint import open_checkpoint
from searchmerge.checkpoints.resident import load_resident, writable_views
from searchmerge.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]

_DECODER = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_QWEN = {
    **_DECODER,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}
_GPT_OSS = {**_DECODER, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
CONFIGS = {
    "mixtral": {**_DECODER, "num_local_experts": 3},
    "qwen2_moe": _QWEN,
    "gpt_oss": {**_GPT_OSS, "layer_types": ["full_attention"] * 2},
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def train(kind, root, **settings):
    """Save a base and an adapter with random factors; return the model in PEFT."""
    model = make(kind)
    model.save_pretrained(root / "base")
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]} | settings
    adapter = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **settings))
    adapter.save_pretrained(root / "adapter")
    return adapter.eval()


def opened(root):
    base = open_checkpoint(root / "base", cache_dir=root / "cache")
    return base, open_checkpoint(root / "adapter", base=base, cache_dir=root / "cache")


_CASES = {
    "both": ("mixtral", {"target_parameters": BOTH}),
    "one": ("mixtral", {"target_parameters": ["experts.down_proj"], "target_modules": []}),
    "router": ("mixtral", {"target_parameters": ["mlp.gate.weight", BOTH[0]]}),
    "rank_stabilised": ("qwen2_moe", {"target_parameters": BOTH, "use_rslora": True}),
    "patterns": (
        "qwen2_moe",
        {
            "target_parameters": BOTH,
            "rank_pattern": {"down_proj": 3},
            "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 9},
        },
    ),
    "transposed": (
        "gpt_oss",
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("case", _CASES)
@torch.no_grad()
def test_factors_of_parameters_are_merged_exactly_as_peft_does(case, tmp_path):
    kind, settings = _CASES[case]
    adapter = train(kind, tmp_path, **settings)
    tokens = torch.arange(12).unsqueeze(0)
    expected_logits = adapter(tokens).logits
    expected = writable_views(adapter.merge_and_unload())
    base, expert = opened(tmp_path)
    weights, before = expert.weights(), base.weights()
    assert expert.headers.keys() == base.headers.keys() == expected.keys()
    changed = [n for n in weights if not torch.equal(weights[n], before[n])]
    assert any("experts" in name for name in changed)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)
    resident = load_resident(expert, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(resident(tokens).logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v[:4].clone() if "experts.lora_A" in k else v for k, v in t.items()},
            r"lora_A and lora_B of 'model\.layers\.0\.mlp\.experts\.down_proj' have shapes "
            r"\[4, 24\] and \[16, 6\]; \[6, 24\] and \[16, 6\] are needed for 3 experts of rank 2",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "experts.lora_B" not in k},
            r"of 'model\.layers\.0\.mlp\.experts' it holds .*experts\.lora_A\.weight; A and B of",
        ),
        (
            lambda t: {k.replace("mlp.experts", "mlp.others"): v for k, v in t.items()},
            r"holds layers that adapter_config\.json does not select .*'model\.layers\.0\.mlp\.o",
        ),
    ],
)
def test_factors_that_do_not_fit_are_refused(change, message, tmp_path):
    train("mixtral", tmp_path, target_parameters=BOTH, target_modules=[])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(CheckpointError, match=rf"adapter_model\.safetensors: {message}"):
        opened(tmp_path)


def test_experts_that_the_base_does_not_have_are_named(tmp_path):
    train("mixtral", tmp_path, target_parameters=BOTH)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    kept = {name: weight for name, weight in weights.items() if name != lost}
    save_file(kept, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    message = (
        r"changes 'model\.layers\.1\.mlp\.experts\.gate_up_proj', of which the base does not h"
    )
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path)


def test_target_parameters_that_are_no_names_are_refused(tmp_path):
    train("mixtral", tmp_path, target_parameters=BOTH)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"target_parameters": "experts.down_proj"}))
    with pytest.raises(CheckpointError, match=r"target_parameters is 'experts.down_proj'; a list"):
        opened(tmp_path)

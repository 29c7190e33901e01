"""Tiny models of several architectures, saved once a session."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers

from searchmerge.checkpoints.checkpoint import Checkpoint, open_checkpoint

_DECODER = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_ENCODER = {name: value for name, value in _DECODER.items() if name != "num_key_value_heads"}
_VISION = {**_ENCODER, "image_size": 16, "patch_size": 8, "num_labels": 3}


class Architecture(NamedTuple):
    config: transformers.PretrainedConfig
    auto_class: str = "AutoModelForCausalLM"

    def make(self, seed: int = 0, **changes: object) -> transformers.PreTrainedModel:
        config = type(self.config).from_dict({**self.config.to_dict(), **changes})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, self.auto_class).from_config(config)
            with torch.no_grad():
                for tensor in model.parameters():  # biases and norms too
                    tensor.add_(torch.randn_like(tensor), alpha=0.02)
        return model.eval()


ARCHITECTURES = {
    "llama": Architecture(transformers.LlamaConfig(**_DECODER)),
    "llama_tied": Architecture(transformers.LlamaConfig(**_DECODER, tie_word_embeddings=True)),
    "qwen2_tied": Architecture(transformers.Qwen2Config(**_DECODER, tie_word_embeddings=True)),
    "gemma": Architecture(transformers.GemmaConfig(**_DECODER, head_dim=8)),
    "gpt2": Architecture(
        transformers.GPT2Config(
            vocab_size=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
        )
    ),
    "mixtral": Architecture(transformers.MixtralConfig(**_DECODER, num_local_experts=3)),
    "qwen3_moe": Architecture(
        transformers.Qwen3MoeConfig(
            **_DECODER, moe_intermediate_size=8, num_experts=3, num_experts_per_tok=2, head_dim=8
        )
    ),
    "bert": Architecture(
        transformers.BertConfig(**_ENCODER, num_labels=3), "AutoModelForSequenceClassification"
    ),
    "vit": Architecture(transformers.ViTConfig(**_VISION), "AutoModelForImageClassification"),
    "t5": Architecture(
        transformers.T5Config(
            vocab_size=64, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8
        ),
        "AutoModelForSeq2SeqLM",
    ),
}

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Return a function that saves a model of an architecture once, and gives its directory."""
    saved: dict[tuple, Path] = {}

    def save(name: str, seed: int = 0, *, shard: str = "1GB", **changes: object) -> Path:
        key = (name, seed, shard, repr(changes))
        if key not in saved:
            saved[key] = tmp_path_factory.mktemp(name) / f"seed{seed}"
            model = ARCHITECTURES[name].make(seed, **changes)
            model.save_pretrained(saved[key], max_shard_size=shard)
        return saved[key]

    return save


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def opened(save: Save, cache_dir: Path) -> Callable[..., Checkpoint]:
    """Return a function that saves a model and opens it."""

    def opened(name: str, seed: int = 0, **changes: object) -> Checkpoint:
        return open_checkpoint(save(name, seed, **changes), cache_dir=cache_dir)

    return opened

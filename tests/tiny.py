"""A language model of a few thousand weights, its experts and a study, made on the spot."""

import json
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

WORDS = ["<s>", "</s>", *(f"w{i}" for i in range(60)), "is", "a"]
EXPERTS = ("first", "second")
_HALF = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
_SHAPES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "t5": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
    "bart": {
        **{f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in _HALF.items()},
        "d_model": 16,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": 1,
    },
}


def save_tokenizer(folder: Path, words=WORDS) -> None:
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<s>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )
    tokenizer.save_pretrained(folder)


def make_models(
    root: Path,
    *,
    kind: str = "llama",
    device: str = "cpu",
    dtype=torch.float32,
    noise: float = 0.2,
    **shape,
) -> None:
    """Save a base, two experts and their tokenizer; ``shape`` is what a configuration says."""
    sizes = _SHAPES.get(kind) or {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    tokens = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(kind, **{**tokens, **sizes, **shape}, tie_word_embeddings=True)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        model = auto_class.from_config(config).to(dtype)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i, name in enumerate(("base", *EXPERTS)):
        generator = torch.Generator(device).manual_seed(i)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator, device=device)
                parameter.copy_(base[key] + drawn * noise * min(i, 1))
        model.save_pretrained(root / name)
        save_tokenizer(root / name)


def make_study(root: Path, **changes) -> Path:
    """Write a study with two lm-eval tasks beside the models, and return its file."""
    tasks = root / "tasks"
    tasks.mkdir(exist_ok=True)
    for n, name in enumerate(EXPERTS):
        rows = [
            {
                "question": f"w{(7 * i + n) % 60} is a",
                "choices": [f"w{(3 * i + j * 11 + n) % 60}" for j in range(3)],
                "answer": (i + n) % 3,
            }
            for i in range(48)
        ]
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tasks / f"{name}.yaml").write_text(
            f"task: tiny_{name}\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{validation: {name}.jsonl}}}}\n"
            "output_type: multiple_choice\n"
            "validation_split: validation\n"
            'doc_to_text: "{{question}}"\n'
            'doc_to_choice: "{{choices}}"\n'
            "doc_to_target: answer\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        )
    study = {
        "base": "base",
        "experts": {name: name for name in EXPERTS},
        "space": {"method": "ties", "coefficient": {"low": 0.0, "high": 2.0}},
        "tasks": {
            name: {"task": f"tiny_{name}", "split": "validation", "select": 24, "hold_out": 24}
            for name in EXPERTS
        },
        "objective": "mean",
        "lm_harness": {"include_path": "tasks"},
        "search": {"sampler": "random", "n_trials": 6, "round_blocks": 2},
        "confirm": {"top_k": 2, "n_resamples": 100},
    }
    file = root / "study.yaml"
    file.write_text(yaml.safe_dump({**study, **changes}, sort_keys=False))
    return file

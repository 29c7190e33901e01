"""Tiny models and a tiny tokenizer, made in memory."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

TEXT = """the quick brown fox jumps over the lazy dog. a word that rhymes with dog is fog.
which word is spelled correctly? the answer is: yes, no, or maybe the answer is not here.
question: what is a kind of animal? answer: a fox, a dog, a lazy cat and a quick horse."""


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 320 tokens, with ``<s>`` and ``</s>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_model(architecture: str) -> PreTrainedModel:
    """Return a model with a window of 64 tokens whose weights make every token matter."""
    torch.manual_seed(0)
    common = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    match architecture:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**common, **sizes))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**common, **sizes, tie_word_embeddings=True))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**common, **sizes, sliding_window=12))
        case "gpt2":
            config = GPT2Config(**common, n_positions=64, n_embd=32, n_layer=2, n_head=4)
            model = GPT2LMHeadModel(config)
        case "bloom":
            model = BloomForCausalLM(BloomConfig(**common, hidden_size=32, n_layer=2, n_head=4))
        case "t5":
            heads = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
            starts = {"decoder_start_token_id": 1, "pad_token_id": 1}
            config = T5Config(**common, **heads, **starts, initializer_factor=3.0)
            model = T5ForConditionalGeneration(config)
        case "bart":
            both = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
            each = {f"{part}_{k}": n for part in ("encoder", "decoder") for k, n in both.items()}
            starts = {"decoder_start_token_id": 1, "pad_token_id": 1, "forced_eos_token_id": 1}
            config = BartConfig(
                **common, **each, **starts, d_model=32, max_position_embeddings=64, init_std=0.3
            )
            model = BartForConditionalGeneration(config)
        case _:
            raise ValueError(architecture)
    return model.eval()

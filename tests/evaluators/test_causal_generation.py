import pytest
import torch

from searchmerge.evaluators.causal_generation import (
    GenerationOptions,
    NonFiniteLogits,
    generate,
)
from tests.evaluators.models import tiny_model, tiny_tokenizer

PROMPTS = [(5, 9, 30), (7,), (11, 12, 13, 14, 15)]


def options(**arguments):
    return GenerationOptions(stop=("no such text",), max_new_tokens=8, arguments=arguments)


def test_sampling_draws_the_same_in_every_call_and_leaves_the_random_state_alone():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    sampled = options(do_sample=True, temperature=1.0)
    torch.manual_seed(1)
    first = generate(model, tokenizer, PROMPTS, sampled, batch_tokens=64)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == after
    assert generate(model, tokenizer, PROMPTS, sampled, batch_tokens=64) == first
    assert generate(model, tokenizer, PROMPTS, options(), batch_tokens=64) != first


def test_a_batch_generates_what_each_prompt_generates_alone():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    greedy = options(do_sample=False)
    together = generate(model, tokenizer, PROMPTS, greedy, batch_tokens=64)
    alone = [generate(model, tokenizer, [p], greedy, batch_tokens=64)[0] for p in PROMPTS]
    end = tokenizer.eos_token_id  # what follows it is padding
    until_end = [row[: row.index(end)] if end in row else row for row in together]
    assert until_end == [row[: row.index(end)] if end in row else row for row in alone]


def test_logits_that_are_not_finite_name_their_prompt():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(NonFiniteLogits, match="prompt 1"):
        generate(model, tiny_tokenizer(), PROMPTS, options(), batch_tokens=64)

from dataclasses import replace

import pytest
import torch

from searchmerge.evaluators.causal.generation import (
    GenerationOptions,
    Generator,
    is_greedy,
)
from searchmerge.evaluators.causal.stopping import NonFiniteLogits
from tests.evaluators.models import tiny_model, tiny_tokenizer

PROMPTS = [(5, 9, 30), (7,), (11, 12, 13, 14, 15)]


def options(**arguments):
    return GenerationOptions(stop=("no such text",), max_new_tokens=8, arguments=arguments)


def drawn(seeds, **arguments):
    return replace(options(do_sample=True, **arguments), seeds=tuple(seeds))


@pytest.mark.parametrize("arguments", [{"temperature": 1.0}, {"temperature": 1.5, "num_beams": 2}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_drawn_depends_on_the_prompt_and_its_seed_alone(architecture, arguments):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    prompts, seeds = [*PROMPTS, *PROMPTS], [5, 6, 7, 8, 9, 10]
    together = Generator(1024).generate(model, tokenizer, prompts, drawn(seeds, **arguments))
    expected = until(together, "")
    assert len(set(expected)) > len(PROMPTS)  # a prompt that is asked again is drawn anew
    for order in (range(6), [4, 1, 5, 0, 3, 2], [2], [5, 1]):
        asked = drawn([seeds[i] for i in order], **arguments)
        rows = [prompts[i] for i in order]
        found = Generator(64).generate(model, tokenizer, rows, asked)  # few at once
        assert until(found, "") == [expected[i] for i in order]
    assert Generator(64).generate(model, tokenizer, PROMPTS, options()) != together[:3]


def test_sampling_leaves_the_random_state_alone():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = torch.random.get_rng_state()
    for n_beams in (1, 2):
        asked = drawn([1, 2, 3], num_beams=n_beams)
        Generator(64).generate(model, tokenizer, PROMPTS, asked)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_batch_generates_what_each_prompt_generates_alone():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    greedy = options(do_sample=False)
    together = Generator(64).generate(model, tokenizer, PROMPTS, greedy)
    alone = [Generator(64).generate(model, tokenizer, [p], greedy)[0] for p in PROMPTS]
    end = tokenizer.eos_token_id  # what follows it is padding
    until_end = [row[: row.index(end)] if end in row else row for row in together]
    assert until_end == [row[: row.index(end)] if end in row else row for row in alone]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "mistral", "bloom"])
@pytest.mark.parametrize("shared", [0, 20])
def test_greedy_decoding_is_that_of_transformers(architecture, shared):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    prefix = tuple(range(100, 100 + shared))
    prompts = [prefix + p for p in (*PROMPTS, (5, 9, 31), tuple(range(20, 40)), (8, 8))]
    plain = options(do_sample=False)
    through_generate = options(do_sample=False, renormalize_logits=True)
    assert is_greedy(model, plain)
    assert not is_greedy(model, through_generate)
    generator = Generator(64)
    expected = until(generator.generate(model, tokenizer, prompts, through_generate), "")
    assert until(generator.generate(model, tokenizer, prompts, plain), "") == expected
    stop = expected[0][2:4]  # some rows end early, and leave the batch
    early = GenerationOptions((stop,), max_new_tokens=8, arguments={"do_sample": False})
    found = until(generator.generate(model, tokenizer, prompts, early), stop)
    assert found == [text.split(stop)[0] for text in expected]


def until(rows, stop):
    """Return the texts of generated rows up to the end token and a stop sequence."""
    texts = []
    for row in rows:
        end = row.index(1) if 1 in row else len(row)
        text = tiny_tokenizer().decode(row[:end])
        texts.append(text.split(stop)[0] if stop else text)
    return texts


def test_a_generation_config_that_asks_for_more_goes_through_transformers():
    model = tiny_model("llama")
    assert is_greedy(model, options(num_beams=1))
    assert not is_greedy(model, options(num_beams=2))
    assert not is_greedy(model, options(do_sample=True))
    model.generation_config.repetition_penalty = 1.3
    assert not is_greedy(model, options())


def test_a_row_ends_with_any_of_the_models_end_tokens():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    greedy = options(do_sample=False)
    [row] = Generator(64).generate(model, tokenizer, PROMPTS[:1], greedy)
    model.generation_config.eos_token_id = [1, row[2]]
    rows = Generator(64).generate(model, tokenizer, PROMPTS, greedy)
    assert rows[0] == row[: row.index(row[2]) + 1]


def test_logits_that_are_not_finite_name_their_prompt():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(NonFiniteLogits, match="prompt 1"):
        Generator(64).generate(model, tiny_tokenizer(), PROMPTS, options())

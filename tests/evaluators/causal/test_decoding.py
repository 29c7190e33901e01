"""Greedy decoding: recorded steps say what steps say that are looked at one by one."""

import logging

import pytest
import torch

from searchmerge.evaluators.causal.decoding import Decoder
from searchmerge.evaluators.causal.model import run_prefix
from searchmerge.evaluators.causal.stopping import NonFiniteLogits, StopSequences
from tests.evaluators.models import tiny_model, tiny_tokenizer

N_NEW = 40
PROMPTS = {
    **dict(enumerate([(5, 9, 30), (7,), (11, 12, 13, 14, 15), (5, 9, 31), (8, 8)])),
    9: tuple(range(20, 40)),
}


def launched(step):
    """Run a step when it is recorded, as CUDA graphs need, and whenever it is replayed."""
    step()
    return step


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def decode(recorder, model, *, prefix=(), stop=("no such text",), n_new=N_NEW):
    tokenizer = tiny_tokenizer()
    decoder = recorder if isinstance(recorder, Decoder) else Decoder(lambda _: recorder)
    stops = StopSequences(tokenizer, stop, 0)
    return decoder.decode(model, PROMPTS, run_prefix(model, prefix), stops, n_new)


@pytest.mark.parametrize("prefix", [(), tuple(range(100, 120))], ids=["alone", "after a prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_recorded_steps_say_what_steps_say_one_by_one(architecture, prefix):
    model = tiny_model(architecture)
    expected = decode(None, model, prefix=prefix, n_new=20)
    assert decode(launched, model, prefix=prefix, n_new=20) == expected
    assert max(map(len, expected)) == 20


def test_rows_end_and_leave_where_they_do_step_by_step():
    model, tokenizer, sizes = tiny_model("llama"), tiny_tokenizer(), []
    expected = decode(None, model)
    stops = tuple(tokenizer.decode(row[9:11]) for row in expected[:4])  # two thirds of the rows
    early = decode(None, model, stop=stops)
    assert len([row for row in early if len(row) < N_NEW]) >= 4
    model.register_forward_pre_hook(
        lambda _, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True
    )
    assert decode(launched, model, stop=stops) == early
    assert min(sizes) <= len(PROMPTS) / 2
    ends = sorted({row[5] for row in expected})
    model.generation_config.eos_token_id = ends
    rows = decode(launched, model)
    assert rows == decode(None, model)
    assert all(row[-1] in ends and not set(row[:-1]) & set(ends) for row in rows)


def test_once_all_rows_are_done_no_more_steps_are_begun():
    model, passes = tiny_model("llama"), []
    expected = decode(None, model)
    model.generation_config.eos_token_id = sorted({row[0] for row in expected})
    model.register_forward_pre_hook(lambda *_: passes.append(True))
    assert [len(row) for row in decode(launched, model)] == [1] * len(PROMPTS)
    assert len(passes) == 1


def test_few_steps_are_not_recorded():
    def refuse(step):
        raise AssertionError("recorded")

    model = tiny_model("llama")
    assert decode(refuse, model, n_new=4) == decode(None, model, n_new=4)


def test_a_model_whose_step_cannot_be_recorded_is_decoded_step_by_step_which_is_said_once(caplog):
    tried = []

    def fails(step):
        tried.append(True)
        step()  # what it has changed does not matter
        raise RuntimeError("operation not permitted when stream is capturing")

    model, decoder = tiny_model("llama"), Decoder(lambda _: fails)
    expected = decode(None, model)
    with caplog.at_level(logging.WARNING):
        assert decode(decoder, model) == decode(decoder, model) == expected
    [line] = [record.getMessage() for record in caplog.records]
    assert "LlamaForCausalLM cannot be recorded" in line
    assert "not permitted when stream is capturing" in line
    assert len(tried) == 1


@pytest.mark.parametrize("recorder", [None, launched], ids=["step by step", "recorded"])
def test_logits_that_are_not_finite_name_their_prompt(recorder):
    model = tiny_model("llama")
    rows = dict(zip(PROMPTS, decode(None, model), strict=True))
    prompt, token = next(
        (prompt, token)
        for prompt, row in rows.items()
        for token in row[3:-1]
        if not any(token in other for n, other in rows.items() if n != prompt)
    )
    model.model.embed_tokens.weight[token] = torch.nan  # its head is not tied to it
    with pytest.raises(NonFiniteLogits, match=f"prompt {prompt} "):
        decode(recorder, model)

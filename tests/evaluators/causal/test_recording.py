"""A step is recorded on one GPU only, and its replays say what steps say one by one."""

import pytest
import torch

from searchmerge.evaluators.causal.decoding import Decoder
from searchmerge.evaluators.causal.recording import NotRecordedError, RecordedSteps, graphs_of
from searchmerge.evaluators.causal.steps import Begun
from searchmerge.evaluators.causal.stopping import Said, StopSequences
from tests.evaluators.causal.test_decoding import decode, launched
from tests.evaluators.models import tiny_model, tiny_tokenizer

N_STEPS = 30


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def begun(model, n_rows=4):
    """Return rows of one token each, of which the next is chosen."""
    first = torch.arange(5, 5 + n_rows)[:, None]
    cache = model(input_ids=first, use_cache=True).past_key_values
    past = [(layer.keys, layer.values) for layer in cache.layers]
    return Begun(first + 20, torch.ones_like(first), torch.ones_like(first), past)


def nothing_said(n_rows=4, ends=()):
    return Said(range(n_rows), ends, StopSequences(tiny_tokenizer(), (), 0))


def test_all_steps_are_run_where_no_row_ends():
    model, said = tiny_model("llama"), nothing_said()
    steps = RecordedSteps(model, begun(model), N_STEPS)
    steps.run(launched, said)
    assert steps.n_run == N_STEPS
    assert [len(tokens) for tokens in said.tokens] == [N_STEPS] * 4
    after = steps.begun()
    assert after.tokens.flatten().tolist() == [tokens[-1] for tokens in said.tokens]
    assert after.positions.flatten().tolist() == [N_STEPS + 1] * 4
    assert after.mask.shape == (4, N_STEPS + 1)
    assert bool(after.mask.all())


def test_it_goes_on_from_where_it_stopped_with_fewer_rows():
    model, whole, said = tiny_model("llama"), nothing_said(), nothing_said()
    RecordedSteps(model, begun(model), N_STEPS).run(launched, whole)
    first = RecordedSteps(model, begun(model), 10)
    first.run(launched, said)
    said.keep([1, 3])
    second = RecordedSteps(model, first.begun().some(torch.tensor([1, 3])), N_STEPS - 10)
    second.run(launched, said)
    assert said.tokens[1::2] == whole.tokens[1::2]
    assert said.tokens[::2] == [tokens[:10] for tokens in whole.tokens[::2]]


def test_few_rows_that_are_left_end_a_recording_that_has_many_steps_to_go():
    model, whole = tiny_model("llama"), nothing_said()
    RecordedSteps(model, begun(model), N_STEPS).run(launched, whole)
    said = nothing_said(ends={tokens[1] for tokens in whole.tokens[:3]})
    steps = RecordedSteps(model, begun(model), N_STEPS)
    steps.run(launched, said)
    assert len(said.left()) <= 1
    assert steps.n_run < N_STEPS


def test_a_step_that_cannot_be_recorded_is_told_whatever_the_reason():
    def fails(step):
        raise LookupError("no such stream")

    model = tiny_model("llama")
    with pytest.raises(NotRecordedError, match="LookupError: no such stream"):
        RecordedSteps(model, begun(model), N_STEPS).run(fails, nothing_said())


def test_a_recording_that_runs_out_of_memory_is_no_refusal():
    def fails(step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        decode(fails, tiny_model("llama"))


def test_steps_are_recorded_on_one_gpu_only():
    assert graphs_of(tiny_model("llama")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_graphs_say_what_steps_say_one_by_one(architecture, caplog):
    model = tiny_model(architecture).cuda()
    expected = decode(None, model)
    assert decode(Decoder(), model) == expected
    assert not caplog.records

"""Logits are read alike on a CPU and where nothing may wait for them, and no others are made."""

import pytest
import torch

from searchmerge.evaluators.causal.documents import Document
from searchmerge.evaluators.causal.layout import lay_out_packed, lay_out_plain
from searchmerge.evaluators.causal.model import head_of
from searchmerge.evaluators.causal.reading import read_here, read_there
from searchmerge.evaluators.causal.scoring import CausalScorer
from tests.evaluators.models import tiny_model

DOCUMENTS = [
    Document((5, 6, 7), ((8, 9), (8, 10), (11,)), (0, 1, 2)),
    Document((5, 6), ((12, 13, 14), (8,)), (3, 4)),
]
BATCHES = {
    "packed": lay_out_packed([DOCUMENTS[:1], DOCUMENTS[1:]], 0, inside=False),
    "plain": lay_out_plain(DOCUMENTS, 64)[0],
}


@pytest.fixture(params=BATCHES)
def batch(request):
    return BATCHES[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_read_what_the_definition_says(batch, dtype):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(len(batch.kept), 16, generator=draw).to(dtype)
    logits[0, batch.targets[0]] = logits[0].max()  # equal to the largest
    here, there = read_here(logits, batch), read_there(logits, batch)
    rows = logits.double()[batch.at]
    expected = rows.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    greedy = rows.argmax(-1) == batch.targets
    for found in (here, there):
        torch.testing.assert_close(found.values.double(), expected, rtol=1e-5, atol=1e-5)
        owners = set(batch.owners.tolist())
        for owner in owners:  # that a whole continuation is greedy is what is asked for
            own = batch.owners == owner
            assert bool(found.greedy[own].all()) == bool(greedy[own].all())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_the_head_computes_no_logits_but_those_that_are_read(architecture):
    model, computed = tiny_model(architecture), []
    model.get_output_embeddings().register_forward_hook(
        lambda module, given, out: computed.append(out.shape[:-1].numel())
    )
    scorer = CausalScorer(256)
    pairs = [((1, 2, 3, i), (7, 8, 9)) for i in range(4)] + [((4, 5), (6, i)) for i in range(3)]
    scorer.score(model, pairs, 64)  # finds out first what the model takes
    computed.clear()
    scorer.score(model, pairs, 64)
    assert sum(computed) == 4 * 3 + 1 + 1  # the last three continuations begin alike


def test_a_head_that_is_given_something_else_computes_all(batch):
    model = tiny_model("llama")
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(tokens).logits
        with head_of(model, (2, 5), torch.tensor([1])) as was_used:
            assert torch.equal(model(tokens).logits, expected)
        assert not was_used()
        with head_of(model, (2, 6), torch.tensor([1, 7])) as was_used:
            some = model(tokens).logits
        assert was_used()
    torch.testing.assert_close(some[0], expected.flatten(0, 1)[[1, 7]])

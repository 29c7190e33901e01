import logging

import pytest
import torch

from searchmerge.evaluators.causal.documents import group_documents
from searchmerge.evaluators.causal.packing import plan_packed
from searchmerge.evaluators.causal.scoring import CausalScorer, honours_packing
from tests.evaluators.models import tiny_model

WINDOW = 64


def sequence(start, length):
    return tuple((start * 37 + 11 * i * (start + 3)) % 300 + 2 for i in range(length))


SHARED = sequence(1, 20)
PAIRS = [
    *((SHARED + sequence(2, 5), sequence(k, 3)) for k in range(3, 7)),
    *((SHARED + sequence(8, 7), sequence(k, 1)) for k in range(3, 7)),  # one-token continuations
    (SHARED + sequence(8, 7), sequence(3, 1)),  # a duplicate choice
    (SHARED + sequence(2, 5), sequence(9, 6)),
    (sequence(10, 1), sequence(11, 4)),
    (sequence(10, 1), sequence(11, 1)),
    (sequence(12, 9), sequence(13, 2)),  # the only continuation of its context
    (sequence(14, 70), sequence(15, 4)),  # longer than the window
    (sequence(14, 70), sequence(16, 2)),
    (sequence(17, 61), sequence(18, 4)),  # just fits
    (sequence(19, 30), sequence(20, 64)),  # the continuation fills the window
]


def reference(model, pairs, window=WINDOW):
    """One row per pair, cut from the left, as lm-eval does it."""
    results = []
    for context, continuation in pairs:
        row = torch.tensor([(context + continuation)[-(window + 1) :][:-1]])
        logits = model(row).logits[0, -len(continuation) :].double()
        targets = torch.tensor(continuation)
        chosen = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
        results.append((chosen.sum().item(), bool((logits.argmax(-1) == targets).all())))
    return results


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def assert_same(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    values = [value for value, _ in found]
    assert values == pytest.approx([value for value, _ in expected], abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [8, 48, 1024])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "bloom"])
def test_scores_are_those_of_one_row_per_continuation(architecture, batch_tokens):
    model = tiny_model(architecture)
    found = CausalScorer(batch_tokens).score(model, PAIRS, WINDOW)
    assert_same(found, reference(model, PAIRS))


def test_a_greedy_continuation_is_recognised():
    model = tiny_model("llama")
    context = sequence(1, 5)
    greedy = context
    for _ in range(4):
        greedy += (model(torch.tensor([greedy])).logits[0, -1].argmax().item(),)
    pairs = [(context, greedy[5:]), (context, (*greedy[5:8], (greedy[8] + 1) % 320))]
    assert [is_greedy for _, is_greedy in CausalScorer(64).score(model, pairs, WINDOW)] == [
        True,
        False,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_token_is_the_greedy_one(dtype):
    model = tiny_model("llama").to(dtype)
    model.lm_head.weight.zero_()
    pairs = [((5, 6), (0,)), ((5, 6), (7,))]
    assert [greedy for _, greedy in CausalScorer(64).score(model, pairs, WINDOW)] == [True, False]


def test_scores_do_not_depend_on_what_else_is_scored():
    model, scorer = tiny_model("llama"), CausalScorer(64)
    together = scorer.score(model, PAIRS, WINDOW)
    alone = [scorer.score(model, [pair], WINDOW)[0] for pair in PAIRS]
    assert_same(alone, together)
    assert scorer.score(model, PAIRS, WINDOW) == together


def test_nothing_to_score_is_no_error():
    assert CausalScorer(64).score(tiny_model("llama"), [], WINDOW) == []


def test_bfloat16_is_close_to_float32():
    model = tiny_model("llama").bfloat16()
    found = CausalScorer(256).score(model, PAIRS, WINDOW)
    expected = reference(model, PAIRS)
    for (value, _), (other, _) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, rel=0.05, abs=0.5)


@pytest.mark.parametrize(
    ("architecture", "verdict"),
    [("llama", True), ("gpt2", True), ("mistral", True), ("bloom", False)],
)
def test_packed_rows_are_used_where_the_model_takes_them(architecture, verdict):
    assert honours_packing(tiny_model(architecture)) is verdict


def test_a_model_that_ignores_the_mask_is_found_out():
    model = tiny_model("llama")
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )
    assert honours_packing(model) is False


def test_a_model_that_ignores_positions_is_found_out():
    model = tiny_model("llama")
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"position_ids": None}), with_kwargs=True
    )
    assert honours_packing(model) is False


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_collapsed_model_says_nothing_of_the_next_weights(value, caplog):
    model, scorer = tiny_model("bloom"), CausalScorer(64)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.fill_(value)
    assert honours_packing(tiny_model("llama")) is True
    scorer.score(model, PAIRS, WINDOW)
    model.load_state_dict(weights)
    assert_same(scorer.score(model, PAIRS, WINDOW), reference(model, PAIRS))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_the_canary_waits_for_weights_that_tell(value):
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.fill_(value)
    assert honours_packing(model) is None


def test_falling_back_is_said_once(caplog):
    model, scorer = tiny_model("bloom"), CausalScorer(64)
    with caplog.at_level(logging.WARNING):
        scorer.score(model, PAIRS, WINDOW)
        scorer.score(model, PAIRS, WINDOW)
    assert [r.message for r in caplog.records if "packed rows" in r.message] == [
        next(r.message for r in caplog.records)
    ]


@pytest.mark.parametrize(("n_documents", "run_before"), [(2, False), (12, True)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prefix_is_run_before_the_rows_or_within_them(architecture, n_documents, run_before):
    model = tiny_model(architecture)
    prefix = sequence(1, 40)
    pairs = [
        (prefix + sequence(k, 4), sequence(k + choice, 3))
        for k in range(n_documents)
        for choice in range(3)
    ]
    documents, _ = group_documents(pairs, WINDOW)
    clusters = plan_packed(documents, 128, WINDOW)
    assert [cluster.prefix != () for cluster in clusters] == [run_before]
    assert_same(reference(model, pairs), CausalScorer(128).score(model, pairs, WINDOW))


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_log_likelihoods_have_the_gradient_of_rows_run_one_by_one(architecture):
    with torch.enable_grad():
        model = tiny_model(architecture)
        weights = torch.linspace(-1, 1, len(PAIRS))
        given = CausalScorer(256).log_likelihoods(model, PAIRS, WINDOW)
        (given * weights).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        expected = torch.stack([_log_likelihood(model, *pair) for pair in PAIRS])
        (expected * weights).sum().backward()
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_what_comes_next_has_the_gradient_of_rows_run_one_by_one(architecture):
    with torch.enable_grad():
        model = tiny_model(architecture)
        given = CausalScorer(256).log_probabilities(model, PAIRS, WINDOW)
        expected = [_log_probabilities(model, *pair) for pair in PAIRS]
        gradients = []
        for distributions in (given, expected):
            loss = sum((p.exp() * p).sum() for p in distributions)
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=2e-3)


def _log_probabilities(model, context, continuation):
    row = torch.tensor([(context + continuation)[-(WINDOW + 1) :][:-1]])
    return model(row).logits[0, -len(continuation) :].log_softmax(-1)


def _log_likelihood(model, context, continuation):
    targets = torch.tensor(continuation)
    return _log_probabilities(model, context, continuation)[range(len(targets)), targets].sum()


def test_what_is_scored_again_is_not_laid_out_again():
    model, scorer = tiny_model("llama"), CausalScorer(64)
    first = scorer.score(model, PAIRS, WINDOW)
    looked_at = []

    class Watched(tuple):
        def __hash__(self):
            looked_at.append(True)
            return super().__hash__()

    watched = [(Watched(context), continuation) for context, continuation in PAIRS]
    assert scorer.score(model, watched, WINDOW) == first
    assert looked_at
    looked_at.clear()
    assert scorer.score(model, watched, WINDOW) == first
    assert scorer.score(model, list(reversed(watched)), WINDOW) != first
    looked_at.clear()
    assert scorer.score(model, list(reversed(watched)), WINDOW) == list(reversed(first))
    assert not looked_at


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "bloom"])
def test_a_gpu_gives_a_cpus_scores(architecture):
    model = tiny_model(architecture)
    expected = CausalScorer(512).score(model, PAIRS, WINDOW)
    scorer = CausalScorer(512)
    for _ in range(2):
        assert_same(scorer.score(model.cuda(), PAIRS, WINDOW), expected)

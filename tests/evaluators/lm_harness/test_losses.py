"""Losses of lm-eval's tasks, against log-likelihoods token by token."""

import pytest
import torch

from searchmerge.evaluators.lm_harness.keys import LmTask
from tests.evaluators.lm_harness.tasks import documents, harness
from tests.evaluators.models import tiny_tokenizer


def differentiated(evaluator, model, examples):
    """Return a task's loss, having seen that it has a gradient."""
    loss = evaluator.loss(model, "mine", examples)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad()
    return loss.item()


def likelihoods(model, pairs):
    """Return the log-likelihood of each continuation, and how many tokens it has."""
    tokenizer = tiny_tokenizer()
    given = []
    for context, continuation in pairs:
        first, both = tokenizer.encode(context), tokenizer.encode(context + continuation)
        with torch.no_grad():
            chances = model(torch.tensor([both])).logits[0].log_softmax(-1)
        places = range(len(first), len(both))
        given.append((sum(float(chances[i - 1, both[i]]) for i in places), len(places)))
    return given


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "brier_score"])
def test_the_loss_of_choices_is_their_cross_entropy_as_the_metric_divides_them(
    folder, model, metric
):
    evaluator = harness(folder, LmTask("mc", "test", metric=(metric,)))
    assert evaluator.tasks["mine"].losses == ("labels", "entropy", "agreement")
    expected = []
    for i, doc in enumerate(documents("test", 7)):
        context = f"question: {doc['question']} answer:"
        given = likelihoods(model, [(context, f" {choice}") for choice in doc["choices"]])
        lengths = [len(c) if metric == "acc_norm" else 1 for c in doc["choices"]]
        values = torch.tensor([v for v, _ in given]) / torch.tensor(lengths)
        expected.append(values.log_softmax(0))
        [log_probabilities] = evaluator.log_probabilities(model, "mine", [i])
        torch.testing.assert_close(log_probabilities.detach(), expected[-1], rtol=1e-3, atol=1e-3)
    losses = [-float(values[i % 4]) for i, values in enumerate(expected)]
    assert differentiated(evaluator, model, range(7)) == pytest.approx(sum(losses) / 7, rel=1e-3)


def test_the_loss_of_what_is_generated_is_the_targets_likelihood_per_token(folder, model):
    evaluator = harness(folder, LmTask("generate", "test"))
    assert evaluator.tasks["mine"].losses == ("labels",)
    docs = documents("test", 7)
    pairs = [(doc["question"], f" {doc['choices'][i % 4]}") for i, doc in enumerate(docs)]
    expected = sum(-value / n for value, n in likelihoods(model, pairs)) / 7
    assert differentiated(evaluator, model, range(7)) == pytest.approx(expected, rel=1e-3)


def test_the_loss_of_texts_is_their_likelihood_per_token(folder, model):
    evaluator = harness(folder, LmTask("texts", "test"))
    assert evaluator.tasks["mine"].losses == ("labels",)
    pairs = [("<s>", doc["question"]) for doc in documents("test", 7)]
    expected = sum(-value / n for value, n in likelihoods(model, pairs)) / 7
    assert differentiated(evaluator, model, range(7)) == pytest.approx(expected, rel=1e-3)

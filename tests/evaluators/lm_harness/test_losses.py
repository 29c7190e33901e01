"""Losses of lm-eval's tasks, against log-likelihoods token by token."""

import pytest
import torch
import yaml

from searchmerge.errors import EvaluationError
from searchmerge.evaluators.lm_harness.keys import LmTask
from searchmerge.evaluators.loss import disagreement, entropy
from tests.evaluators.lm_harness.tasks import documents, harness
from tests.evaluators.models import tiny_tokenizer


def differentiated(evaluator, model, examples):
    """Return a task's loss, having seen that it has a gradient."""
    loss = evaluator.loss(model, "mine", examples).mean()
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
    assert evaluator.tasks["mine"].losses == ("labels", "entropy", "agreement")
    docs = documents("test", 7)
    pairs = [(doc["question"], f" {doc['choices'][i % 4]}") for i, doc in enumerate(docs)]
    expected = sum(-value / n for value, n in likelihoods(model, pairs)) / 7
    assert differentiated(evaluator, model, range(7)) == pytest.approx(expected, rel=1e-3)


def test_the_loss_of_texts_is_their_likelihood_per_token(folder, model):
    evaluator = harness(folder, LmTask("texts", "test"))
    assert evaluator.tasks["mine"].losses == ("labels", "entropy", "agreement")
    pairs = [("<s>", doc["question"]) for doc in documents("test", 7)]
    expected = sum(-value / n for value, n in likelihoods(model, pairs)) / 7
    assert differentiated(evaluator, model, range(7)) == pytest.approx(expected, rel=1e-3)


def next_tokens(model, context, continuation):
    """Return what comes next at every token of a continuation, or first where there is none."""
    tokenizer = tiny_tokenizer()
    first, both = tokenizer.encode(context), tokenizer.encode(context + continuation)
    n_tokens = max(1, len(both) - len(first))
    logits = model(torch.tensor([both])).logits[0, len(first) - 1 :][:n_tokens]
    return logits.log_softmax(-1)


UNLABELLED = {
    "generate": (LmTask("generate", "test"), lambda d, i: (d["question"], f" {d['choices'][i]}")),
    "open": (LmTask("open", "test"), lambda d, i: (d["question"], "")),
    "texts": (LmTask("texts", "test"), lambda d, i: ("<s>", d["question"])),
}


@pytest.mark.parametrize("kind", UNLABELLED)
def test_what_comes_next_is_told_where_an_answer_stands(folder, model, kind):
    task, pair_of = UNLABELLED[kind]
    evaluator = harness(folder, task)
    docs = list(documents("test", 7))
    given = evaluator.log_probabilities(model, "mine", range(7))
    for i, (doc, of_doc) in enumerate(zip(docs, given, strict=True)):
        expected = next_tokens(model, *pair_of(doc, i % 4))
        torch.testing.assert_close(of_doc, expected, rtol=1e-3, atol=1e-3)


def test_a_task_whose_documents_have_no_answers_has_losses_without_labels_alone(folder):
    assert harness(folder, LmTask("open", "test")).tasks["mine"].losses == (
        "entropy",
        "agreement",
    )


UNANSWERED = {
    "mc": (
        "{{'none' if answer == 2 else answer}}",
        "document 2 of 'some_mc' has no right answer amo",
    ),
    "generate": (
        "{{'' if answer == 2 else choices[answer]}}",
        "document 2 of 'some_generate' has a target of 0 tokens, ''; to learn from it takes 1 to",
    ),
    "sampled": (
        "{{' dog' * 9999 if answer == 2 else choices[answer]}}",
        r"document 2 of 'some_sampled' has a target of \d+ tokens, '.{9,99}'; to learn",
    ),
}


def changed(folder, kind, **keys):
    """Return a task like another, with some of its keys changed."""
    task = yaml.safe_load((folder / f"{kind}.yaml").read_text())
    name = f"some_{kind}"
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | {"task": name, **keys}))
    return LmTask(name, "test")


@pytest.mark.parametrize("kind", UNANSWERED)
def test_a_document_without_an_answer_to_learn_from_is_known_before_anything_is_run(
    folder, model, kind
):
    task = changed(folder, kind, doc_to_target=UNANSWERED[kind][0])
    info = harness(folder, task, learns="labels", config=model.config).tasks["mine"]
    assert info.losses == ("labels", "entropy", "agreement")
    assert info.without_loss == tuple(range(2, info.n_examples, 4))
    for learns in ("entropy", "agreement", None):  # they need no answer
        evaluator = harness(folder, task, learns=learns)
        assert evaluator.tasks["mine"].without_loss == ()
        given = evaluator.log_probabilities(model, "mine", [1, 2])
        assert all(of_example.isfinite().all() for of_example in given)


def test_where_the_first_document_has_no_answer_the_others_are_learnt_from(folder):
    task = changed(folder, "mc", doc_to_target="{{'none' if answer == 0 else answer}}")
    assert "labels" not in harness(folder, task).tasks["mine"].losses
    info = harness(folder, task, learns="labels").tasks["mine"]
    assert info.losses == ("labels", "entropy", "agreement")
    assert info.without_loss[0] == 0
    assert 1 not in info.without_loss


def test_where_no_document_has_an_answer_there_is_no_such_loss(folder):
    task = changed(folder, "mc", doc_to_target="none")
    info = harness(folder, task, learns="labels").tasks["mine"]
    assert info.losses == ("entropy", "agreement")
    assert info.without_loss == tuple(range(info.n_examples))


@pytest.mark.parametrize("learns", ["labels", "entropy", "agreement"])
def test_an_empty_text_has_no_loss_of_any_kind(folder, learns):
    task = changed(folder, "texts", doc_to_target="{{'' if answer == 1 else question}}")
    info = harness(folder, task, learns=learns).tasks["mine"]
    assert info.without_loss == tuple(range(1, info.n_examples, 4))


@pytest.mark.parametrize("kind", UNANSWERED)
def test_a_document_without_an_answer_to_learn_from_fails_the_candidate_alone(folder, model, kind):
    target, message = UNANSWERED[kind]
    evaluator = harness(folder, changed(folder, kind, doc_to_target=target))
    assert evaluator.tasks["mine"].losses[0] == "labels"
    assert torch.isfinite(evaluator.loss(model, "mine", [0, 1])).all()
    with pytest.raises(EvaluationError, match=message):
        evaluator.loss(model, "mine", [0, 1, 2])


@pytest.mark.parametrize("kind", ["mc", "generate", "open", "texts"])
@pytest.mark.parametrize("loss", ["entropy", "agreement"])
def test_their_gradients_are_what_finite_differences_give(folder, model, kind, loss):
    evaluator = harness(folder, LmTask(kind, "test"))
    parameters = [p for p in model.double().parameters() if p.dim() > 1]
    draw = torch.Generator().manual_seed(0)
    ways = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in parameters]
    move(parameters, ways, 0.05)
    with torch.no_grad():
        teacher = evaluator.log_probabilities(model, "mine", range(3))
    move(parameters, ways, -0.05)

    def value():
        given = evaluator.log_probabilities(model, "mine", range(3))
        return (entropy(given) if loss == "entropy" else disagreement(given, teacher)).sum()

    gradients = torch.autograd.grad(value(), parameters)
    slope = sum(float((g * way).sum()) for g, way in zip(gradients, ways, strict=True))
    ends = []
    for by in (1e-3, -2e-3):
        move(parameters, ways, by)
        ends.append(float(value().detach()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=2e-2, abs=1e-3)


@torch.no_grad()
def move(parameters, ways, by):
    for parameter, way in zip(parameters, ways, strict=True):
        parameter += by * way

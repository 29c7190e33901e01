"""Requests are asked all at once, and what is not finite names its example."""

import pytest
import torch

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.causal.stopping import NonFiniteLogits
from searchmerge.evaluators.lm_harness.asking import ask
from searchmerge.evaluators.lm_harness.keys import LmTask
from tests.evaluators.lm_harness.tasks import harness, instances
from tests.evaluators.models import tiny_model


class Answers:
    """A language model that answers by heart, and counts what it is asked at once."""

    def __init__(self, likelihood=-1.5, fails=None):
        self.n_asked, self.likelihood, self.fails = [], likelihood, fails

    def loglikelihood(self, requests):
        self.n_asked.append(len(requests))
        return [(self.likelihood, True) for _ in requests]

    def loglikelihood_rolling(self, requests):
        self.n_asked.append(len(requests))
        return [self.likelihood for _ in requests]

    def generate_until(self, requests):
        self.n_asked.append(len(requests))
        if self.fails is not None:
            raise self.fails
        return [f"answer {i}" for i, _ in enumerate(requests)]


def test_all_requests_of_a_type_are_asked_at_once_as_often_as_each_is_repeated():
    choices = instances("loglikelihood", [("a", " b"), ("a", " c")])
    texts = instances("generate_until", [("a", {}), ("b", {})])
    texts[1].repeats = 3
    choices[0].resps = ["of another candidate"]
    lm = Answers()
    ask(lm, [choices[0], texts[0], choices[1], texts[1]], "mine")
    assert lm.n_asked == [2, 4]
    assert [request.resps for request in choices] == [[(-1.5, True)]] * 2
    assert [request.resps for request in texts] == [
        ["answer 0"],
        ["answer 1", "answer 2", "answer 3"],
    ]


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_a_log_likelihood_that_is_not_finite_names_its_example(kind):
    requests = instances(kind, [("a", " b")])
    requests[0].doc_id = 5
    told = "task 'mine', document 5 of 't': the model gave a log-likelihood of nan, which is"
    with pytest.raises(EvaluationError, match=told):
        ask(Answers(float("nan")), requests, "mine")


def test_a_prompt_whose_logits_are_not_finite_names_its_example_and_a_wrong_request_its_task():
    requests = instances("generate_until", [("a", {}), ("b", {})])
    requests[0].repeats = 2
    with pytest.raises(EvaluationError, match=f"document {requests[1].doc_id} of .* not finite"):
        ask(Answers(fails=NonFiniteLogits(2)), requests, "mine")
    with pytest.raises(SpecError, match=r"^tasks\.mine: too long$"):
        ask(Answers(fails=SpecError("too long")), requests, "mine")


@pytest.mark.parametrize("task", ["mc", "texts", "generate"])
def test_logits_that_are_not_finite_fail_the_candidate_by_name(folder, task):
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    evaluator = harness(folder, LmTask(task, "test", samples=(5, 1, 4)))
    told = rf"task 'mine', document 4 of '{task}': .*not finite"
    with pytest.raises(EvaluationError, match=told):
        evaluator.score(broken, "mine", [2])

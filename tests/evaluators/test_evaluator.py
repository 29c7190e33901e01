"""What every evaluator keeps to, whatever it scores."""

import copy
import math
import pickle

import pytest
import torch
import yaml
from torch import nn

from searchmerge.assemble import make_evaluators
from searchmerge.checkpoints.resident import load_resident
from searchmerge.errors import EvaluationError
from searchmerge.evaluators.evaluator import EVALUATORS, EvaluationContext, evaluating
from searchmerge.models import open_models
from searchmerge.study import read_study
from tests.evaluators.classifiers import make_experts, text_tasks, write_study, write_texts
from tests.tiny import make_models, make_study

FUNCTION = """
def norm(model, task, examples):
    entries = model.get_parameter("model.norm.weight")
    return [float(entries[example]) for example in examples]
"""


def lm_eval_accuracy(folder):
    make_models(folder)
    return make_study(folder)


def lm_eval_whole(folder):
    """A score that lm-eval makes of all examples at once."""
    file = lm_eval_accuracy(folder)
    metric = {
        "metric": "brier_score",
        "aggregation": "brier_score",
        "higher_is_better": False,
    }
    task = {"include": "first.yaml", "task": "whole", "metric_list": [metric]}
    (folder / "tasks" / "whole.yaml").write_text(yaml.safe_dump(task))
    return make_study(file.parent, tasks={"whole": {"split": "validation"}})


def likelihoods(folder):
    make_models(folder)
    (folder / "texts.txt").write_text("".join(f"w{i} is a w{2 * i % 60}\n" for i in range(24)))
    return make_study(folder, tasks={"texts": {"evaluator": "perplexity", "data": "texts.txt"}})


def accuracies(folder):
    make_experts(folder)
    write_texts(folder)
    return write_study(folder, text_tasks())


def macro_f1s(folder):
    make_experts(folder)
    write_texts(folder)
    return write_study(folder, text_tasks(metric="macro_f1"))


def functions(folder):
    make_models(folder)
    (folder / "contract_function.py").write_text(FUNCTION)
    task = {"evaluator": "function", "function": "contract_function:norm", "n_examples": 16}
    return make_study(folder, tasks={"norm": task})


CASES = {
    "classification": (accuracies, macro_f1s),
    "function": (functions,),
    "lm_harness": (lm_eval_accuracy, lm_eval_whole),
    "perplexity": (likelihoods,),
}
OURS = sorted(
    name for name, kind in EVALUATORS.items() if kind.build.__module__.startswith("searchmerge.")
)


def test_every_evaluator_is_held_to_the_contract():
    assert sorted(CASES) == OURS


class Case:
    """The evaluators of a study, and its resident model."""

    def __init__(self, write, folder):
        self.study = read_study(write(folder))
        self.models = open_models(self.study)
        self.model = load_resident(
            self.models.base,
            dtype=torch.float32,
            device="cpu",
            auto_class=self.study.spec.resident_class,
        )
        self.evaluators = self.built()
        self.task = next(iter(self.evaluators))
        self.info = self.evaluators[self.task].tasks[self.task]

    def built(self):
        return make_evaluators(self.study, self.models, "cpu")

    def score(self, examples, model=None, evaluator=None):
        evaluator = evaluator or self.evaluators[self.task]
        return evaluator.score(model or self.model, self.task, examples)


@pytest.fixture(
    scope="module", params=[case for cases in CASES.values() for case in cases],
    ids=lambda case: case.__name__,
)  # fmt: skip
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param.__name__))


def test_every_task_of_the_study_has_its_examples_and_a_metric(case):
    assert case.evaluators.keys() == case.study.spec.tasks.keys()
    for task, evaluator in case.evaluators.items():
        assert evaluator.tasks[task].n_examples >= 2
        assert evaluator.tasks[task].metric


@pytest.mark.parametrize("examples", [[0], [3, 1], range(10)], ids=len)
def test_there_is_a_finite_number_for_each_example_or_one_in_all(case, examples):
    found = case.score(examples)
    assert isinstance(found, tuple)
    assert len(found) == case.info.kind.n_values(len(examples))
    assert all(isinstance(value, float) and math.isfinite(value) for value in found)


def test_the_same_weights_and_examples_give_the_same_scores(case):
    found = case.score(range(10))
    case.score([9, 2])
    assert case.score(range(10)) == found
    assert case.score(range(10), copy.deepcopy(case.model)) == found
    fresh = case.built()[case.task]
    fresh.score(case.model, case.task, [7])
    assert case.score(range(10), evaluator=fresh) == found


def test_an_example_scores_the_same_in_any_order_and_company(case):
    found = case.score(range(10))
    order = [4, 9, 0, 7, 1, 8, 2, 6, 3, 5]
    turned = case.score(order)
    if len(found) == 1:
        assert turned == pytest.approx(found, abs=1e-5)
        return
    assert turned == pytest.approx([found[example] for example in order], abs=1e-5)
    for example in (0, 6):
        assert case.score([example]) == pytest.approx([found[example]], abs=1e-5)


def test_other_weights_give_other_scores(case):
    other = copy.deepcopy(case.model)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw))
    examples = range(case.info.n_examples)
    assert case.score(examples, other) != case.score(examples)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_the_model_and_the_random_state_are_left_as_they_were(case, mode):
    expected = case.score(range(6))
    model = copy.deepcopy(case.model).train(mode)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert case.score(range(6), model) == expected  # without dropout
    assert all(module.training == mode for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_scored_is_said_by_task_and_example(case):
    broken = copy.deepcopy(case.model)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(EvaluationError, match=rf"task '{case.task}'.* (example|document) [52]\b"):
        case.score([5, 2], broken)
    case.score([5, 2])  # and the next candidate can be


def test_what_the_search_is_told_of_a_task_can_be_sent_to_another_process(case):
    sent = pickle.loads(pickle.dumps(case.info))
    assert (sent.n_examples, sent.metric) == (case.info.n_examples, case.info.metric)
    values = case.score(range(10))
    assert sent.kind.score(values) == case.info.kind.score(values)
    assert sent.kind.observations(values) == case.info.kind.observations(values)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_dropout_is_off_while_a_model_is_evaluated_even_if_that_fails(mode):
    model = nn.Sequential(nn.Dropout(0.5)).train(mode)
    with pytest.raises(KeyError), evaluating(model):
        assert not model[0].training
        raise KeyError
    assert model[0].training == mode


@pytest.mark.parametrize(
    ("device", "asked", "size"),
    [("cpu", None, 8), ("cuda:1", None, 64), ("mps", None, 8), ("cuda", 5, 5)],
)
def test_a_size_is_what_was_asked_for_or_the_devices(tmp_path, device, asked, size):
    context = EvaluationContext(
        folder=tmp_path,
        resolve=str,
        model_dir=tmp_path,
        device=device,
        dtype=torch.float32,
        head=lambda expert, pooling: None,
    )
    assert context.sized(asked, {"cpu": 8, "cuda": 64}) == size

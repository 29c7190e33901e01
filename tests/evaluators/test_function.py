import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.errors import EvaluationError, SpecError, StudyError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.evaluators.function import Counts, FunctionEvaluator, FunctionKeys
from searchmerge.fingerprint import fingerprint
from searchmerge.models import open_models
from searchmerge.search.references import reference_plans
from searchmerge.study import read_study
from searchmerge.watch import content_of
from tests.tiny import make_models, make_study

MODULE = """
import sys

import numpy as np
import torch

def bias(model, task, examples):
    return [model.bias.item() * len(task) + example for example in examples]

def pairs(model, task, examples):
    return [(float(example > 0), example - 0.5) for example in examples]

def too_few(model, task, examples):
    return [0.5]

def endless(model, task, examples):
    return [float("inf") if example == 3 else 0.0 for example in examples]

def broken(model, task, examples):
    return [{}["gold"] for _ in examples]

def lines(model, task, examples):
    raise ValueError("no\\n  such row")

def words(model, task, examples):
    return ["good" for _ in examples]

def digits(model, task, examples):
    return ["0.5" for _ in examples]

def text(model, task, examples):
    return "55"

def mapping(model, task, examples):
    return {0: 0.5, 3: 0.5}

def truths(model, task, examples):
    return [True for _ in examples]

def empty(model, task, examples):
    return None

def nones(model, task, examples):
    return [None for _ in examples]

def single(model, task, examples):
    return 0.5

def imaginary(model, task, examples):
    return [0.5 + 0j for _ in examples]

def huge(model, task, examples):
    return [10**400 for _ in examples]

def leave(model, task, examples):
    sys.exit()

def leave_late(model, task, examples):
    def scores():
        yield 0.5
        raise SystemExit(0)
    return scores()

def base_error(model, task, examples):
    raise BaseException("no  more")

def tensor(model, task, examples):
    return torch.tensor(examples, dtype=torch.float32)

def array(model, task, examples):
    return np.array(examples, dtype=np.float32)

def scalars(model, task, examples):
    return (torch.tensor(e) if e else np.int64(e) for e in examples)

def half(model, task, examples):
    model.half()
    return [0.5 for _ in examples]

def double_and_back(model, task, examples):
    model.double().float()
    return [0.5 for _ in examples]

def meta(model, task, examples):
    model.to("meta")
    raise ValueError("no data")

def replace(model, task, examples):
    model.bias = torch.nn.Parameter(model.bias.detach().clone())
    return [0.5 for _ in examples]

def take(model, task, examples):
    del model.bias
    return [0.5 for _ in examples]

def put(model, task, examples):
    model.more = torch.nn.Linear(1, 1)
    return [0.5 for _ in examples]

def turn(model, task, examples):
    model.weight.data = model.weight.data.repeat(2, 1)
    return [0.5 for _ in examples]

def train(model, task, examples):
    model.train().requires_grad_()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    with torch.enable_grad():
        model(torch.ones(1, 1, dtype=torch.float32)).sum().backward()
    return [0.5 for _ in examples]

not_a_function = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "scores_of_mine.py").write_text(MODULE)
    (tmp_path / "raises.py").write_text("raise RuntimeError('no data here')\n")
    (tmp_path / "exits_at_once.py").write_text("import sys\nsys.exit(0)\n")
    return tmp_path


def evaluator(folder, name):
    return FunctionEvaluator(f"scores_of_mine:{name}", {"mine": TaskInfo(5)}, search_path=folder)


@pytest.fixture
def model():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.bias, 0.25)
    return model


def test_the_users_function_scores_the_model(folder, model):
    mine = evaluator(folder, "bias")
    assert mine.tasks == {"mine": TaskInfo(5)}
    assert mine.score(model, "mine", [4, 0]) == (5.0, 1.0)


def test_a_function_may_have_examples_of_each_part():
    keys = FunctionKeys("scores_of_mine:bias", Counts(select=3, hold_out=5))
    info = keys.info
    assert (info.n_examples, info.n_of("select"), info.n_of("hold_out")) == (8, 3, 5)
    assert info.parts["select"].source == "n_examples.select of scores_of_mine:bias"
    assert FunctionKeys("scores_of_mine:bias", 4).info == TaskInfo(4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", r"task 'mine': scores_of_mine:too_few returned 1 score for 2 examples"),
        ("endless", r"task 'mine': scores_of_mine:endless scored example 3 inf"),
        ("broken", r"task 'mine': scores_of_mine:broken raised KeyError: 'gold'"),
        ("lines", r"task 'mine': scores_of_mine:lines raised ValueError: no such row"),
        ("words", r"words scored example 0 'good' \(str\); a finite number is needed"),
        ("digits", r"digits scored example 0 '0\.5' \(str\)"),
        ("text", r"text returned '55' \(str\); a list of one number, or one pair"),
        ("mapping", r"mapping returned \{0: 0\.5, 3: 0\.5\} \(dict\)"),
        ("truths", r"truths scored example 0 True \(bool\)"),
        ("empty", r"empty returned None \(NoneType\)"),
        ("nones", r"nones scored example 0 None"),
        ("single", r"single returned 0\.5 \(float\)"),
        ("imaginary", r"imaginary scored example 0 \(0\.5\+0j\) \(complex\)"),
        ("huge", r"huge scored example 0 10{20}"),
        ("leave", r"task 'mine': scores_of_mine:leave called sys\.exit\(None\)"),
        ("leave_late", r"scores_of_mine:leave_late called sys\.exit\(0\)"),
        ("base_error", r"base_error raised BaseException: no more"),
    ],
)
def test_what_is_no_score_fails_the_candidate(folder, model, name, message):
    with pytest.raises(EvaluationError, match=message):
        evaluator(folder, name).score(model, "mine", [0, 3])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scores_of_mine", r"'scores_of_mine' is not of the form module:function"),
        ("scores_of_mine:nothing", r"module 'scores_of_mine' has no function 'nothing'"),
        ("scores_of_mine:not_a_function", r"has no function 'not_a_function'"),
        ("no_such_module:score", r"module 'no_such_module'.*No module named"),
        ("raises:score", r"module 'raises'.*RuntimeError: no data here"),
        ("exits_at_once:score", r"importing module 'exits_at_once' called sys\.exit\(0\)"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused(folder, name, message):
    with pytest.raises(SpecError, match=message):
        FunctionEvaluator(name, {"mine": TaskInfo(5)}, search_path=folder)


@pytest.mark.parametrize("name", ["tensor", "array", "scalars"])
def test_numbers_may_come_in_any_list_of_numbers(folder, model, name):
    assert evaluator(folder, name).score(model, "mine", [0, 3]) == (0.0, 3.0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("half", r"'weight', torch\.float32 \[1, 1\] on cpu, torch\.float16 \[1, 1\] on cpu"),
        (
            "double_and_back",
            r"'weight', torch\.float32 \[1, 1\] on cpu, the same in another place",
        ),
        ("meta", r"'weight', .*, torch\.float32 \[1, 1\] on meta"),
        ("replace", r"'bias', torch\.float32 \[1\] on cpu, the same in another place"),
        ("turn", r"'weight', torch\.float32 \[1, 1\] on cpu, torch\.float32 \[2, 1\] on cpu"),
        ("take", "took 'bias' out of the model"),
        ("put", r"put 'more\.weight' into the model"),
    ],
)
def test_a_function_that_changes_the_model_stops_the_study(folder, model, name, change):
    message = rf"task 'mine': scores_of_mine:{name} .*{change}; it may read the model"
    with pytest.raises(StudyError, match=message):
        evaluator(folder, name).score(model, "mine", [0, 3])


def test_what_a_function_leaves_switched_is_put_right(folder, model):
    model.eval().requires_grad_(requires_grad=False)
    evaluator(folder, "train").score(model, "mine", [0, 3])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_a_study_hands_the_merged_model_to_the_function(tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path / "cache"))
    make_models(tmp_path)
    (tmp_path / "own_scores.py").write_text(
        "def score(model, task, examples):\n"
        "    weight = model.get_parameter('layers.0.mlp.up_proj.weight').flatten()\n"
        "    return [float(weight[example]) for example in examples]\n"
    )
    task = {"evaluator": "function", "function": "own_scores:score", "n_examples": 40}
    file = make_study(tmp_path, tasks={"own": task}, model_class="AutoModel")
    study = read_study(file)
    config = RunConfig(engine="eager", device="cpu")
    models = open_models(study)
    worker = assemble.make_worker(study, models, config)
    schedule = assemble.make_schedule(study, worker.tasks())
    plans = reference_plans(study.experts)
    for plan, folder in (("base", "base"), ("expert second", "second")):
        weights = load_file(tmp_path / folder / "model.safetensors")
        weight = weights["model.layers.0.mlp.up_proj.weight"].flatten()
        for result in worker.score(plans[plan], schedule.rounds["pilot"]):
            for scores in result.scores:
                expected = [float(weight[example]) for example in scores.block.examples]
                assert scores.values == pytest.approx(expected, abs=1e-6)
    before = fingerprint(study, content_of(models), "cpu")
    (tmp_path / "own_scores.py").write_text("def score(model, task, examples): return []")
    assert fingerprint(study, content_of(models), "cpu") != before


LOSS = """
import torch

def score(model, task, examples):
    return [1.0 for _ in examples]

def loss(model, task, examples):
    return model(torch.ones(len(examples), 1)).square().mean()

def number(model, task, examples):
    return 0.5

def apart(model, task, examples):
    return torch.tensor(0.5)
"""


def with_loss(folder, loss):
    name = f"losses_{folder.name.replace('-', '_')}"
    (folder / f"{name}.py").write_text(LOSS)
    keys = FunctionKeys(f"{name}:score", 5, None if loss is None else f"{name}:{loss}")
    return FunctionEvaluator(keys.function, {"t": keys.info}, loss=keys.loss, search_path=folder)


def test_a_function_may_come_with_a_loss(tmp_path):
    evaluator, model = with_loss(tmp_path, "loss"), nn.Linear(1, 1)
    assert evaluator.tasks["t"].losses == ("labels",)
    evaluator.loss(model, "t", [0, 1]).backward()
    assert model.weight.grad is not None
    with torch.no_grad():
        assert not evaluator.loss(model, "t", [0]).requires_grad
    assert with_loss(tmp_path, None).tasks["t"].losses == ()


def test_gradients_of_earlier_passes_are_left_as_they_are(tmp_path):
    evaluator, model = with_loss(tmp_path, "loss"), nn.Linear(1, 1)
    evaluator.loss(model, "t", [0]).backward()
    once = model.weight.grad.clone()
    evaluator.score(model, "t", [0])
    evaluator.loss(model, "t", [1]).backward()
    assert torch.equal(model.weight.grad, 2 * once)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("number", r"number returned 0.5 \(float\); a tensor of one number is needed"),
        ("apart", "apart returned a loss that does not depend on the model's weights"),
    ],
)
def test_what_is_no_loss_is_refused(tmp_path, loss, message):
    with pytest.raises(EvaluationError, match=message):
        with_loss(tmp_path, loss).loss(nn.Linear(1, 1), "t", [0])


def test_of_what_is_returned_it_is_not_said_that_it_was_raised(folder, model):
    with pytest.raises(EvaluationError, match=r"^task 'mine': \S+:words scored example 0 'good'"):
        evaluator(folder, "words").score(model, "mine", [0, 3])


def test_the_users_function_may_grade_beside_the_score(folder, model):
    graded = evaluator(folder, "pairs")
    assert graded.score(model, "mine", [4, 0]) == (1.0, 0.0)
    assert graded.grades("mine", [4, 0]) == (3.5, -0.5)
    plain = evaluator(folder, "bias")
    plain.score(model, "mine", [4, 0])
    assert plain.grades("mine", [4, 0]) == ()

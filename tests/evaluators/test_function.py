import pytest
from safetensors.torch import load_file
from torch import nn

from searchmerge import assemble
from searchmerge.config import RunConfig
from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.evaluators.function import FunctionEvaluator
from searchmerge.fingerprint import fingerprint
from searchmerge.models import open_models
from searchmerge.search.references import reference_plans
from searchmerge.study import read_study
from tests.tiny import make_models, make_study

MODULE = """
def bias(model, task, examples):
    return [model.bias.item() * len(task) + example for example in examples]

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

not_a_function = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "scores_of_mine.py").write_text(MODULE)
    (tmp_path / "raises.py").write_text("raise RuntimeError('no data here')\n")
    return tmp_path


def evaluator(folder, name):
    return FunctionEvaluator(f"scores_of_mine:{name}", {"mine": 5}, search_path=folder)


@pytest.fixture
def model():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.bias, 0.25)
    return model


def test_the_users_function_scores_the_model(folder, model):
    mine = evaluator(folder, "bias")
    assert mine.tasks == {"mine": TaskInfo(5)}
    assert mine.score(model, "mine", [4, 0]) == (5.0, 1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", r"task 'mine': scores_of_mine:too_few returned 1 scores for 2 examples"),
        ("endless", r"task 'mine': scores_of_mine:endless scored example 3 inf"),
        ("broken", r"task 'mine': scores_of_mine:broken raised KeyError: 'gold'"),
        ("lines", r"task 'mine': scores_of_mine:lines raised ValueError: no such row"),
        ("words", r"task 'mine': scores_of_mine:words raised ValueError: .*'good'"),
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
    ],
)
def test_a_function_that_cannot_be_imported_is_refused(folder, name, message):
    with pytest.raises(SpecError, match=message):
        FunctionEvaluator(name, {"mine": 5}, search_path=folder)


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
    before = fingerprint(study, models, "cpu")
    (tmp_path / "own_scores.py").write_text("def score(model, task, examples): return []")
    assert fingerprint(study, models, "cpu") != before

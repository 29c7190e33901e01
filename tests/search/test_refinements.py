"""A study's best plans are refined once, scored like trials, and may win."""

import contextlib
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from searchmerge.check import check_study
from searchmerge.config import RunConfig
from searchmerge.errors import SpecError
from searchmerge.plan import Groups, MergePlan
from searchmerge.run import run_study
from searchmerge.search.directory import records_of, stored_study
from searchmerge.search.racing import Racing
from searchmerge.search.refine import Recipe
from searchmerge.search.refinements import Refinements, Refining, material
from searchmerge.search.status import read_status
from searchmerge.study import kept_study, read_study
from tests.evaluators.classifiers import (
    CLASSES,
    make_experts,
    text_tasks,
    write_study,
    write_texts,
)
from tests.search.conftest import Recorder, pilot_schedule
from tests.tiny import make_models, make_study
from tests.toy import EXPERTS as TOYS
from tests.waiting import wait_for

CONFIG = RunConfig(device="cpu")
REFINE = {"loss": "agreement", "steps": 12, "batch": 24, "rate": 0.1, "starts": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refined")
    make_experts(folder, "bert")
    write_texts(folder, 72)
    return folder


def study(folder, refine=REFINE, tasks=None, **changes):
    tasks = tasks or text_tasks(select=48, hold_out=24)
    search = {"sampler": "random", "n_trials": 5, "round_blocks": 2, "refine": refine}
    confirm = {"top_k": 9, "n_resamples": 100}
    return read_study(write_study(folder, tasks, search=search, confirm=confirm, **changes))


def records(run_dir):
    with stored_study(run_dir) as stored:
        return records_of(stored)


def outcomes(run_dir):
    """Return what came of refinements: the trials that were enqueued, and those that paid not."""
    with stored_study(run_dir) as stored:
        proposed = [trial.user_attrs for trial in stored.trials if "refines" in trial.user_attrs]
        nothing = {k: v for k, v in stored.user_attrs.items() if k.startswith("unrefined:")}
    what = ("refines", "plan", "refining")
    return [{k: attributes[k] for k in what} for attributes in proposed], nothing


@pytest.fixture(scope="module")
def ran(folder):
    """Return a study that was run with refinement, its results, and what was told of it."""
    told = Recorder()
    asked = study(folder)
    return asked, run_study(asked, CONFIG, folder / "run", told), told


def test_what_a_refinement_proposes_is_a_trial_like_any_other(folder, ran):
    refined = [record for record in records(folder / "run") if record.refines]
    assert refined, outcomes(folder / "run")
    for record in refined:
        assert record.name == f"refined {record.refines}"
        assert record.is_full
        assert record.number >= 5
        assert record.se is not None
        assert record.score_s > 0
        assert len(record.plan.groups) > 20
        assert record.plan.groups.tensors
        assert set(record.scores) == {"first", "second"}
    shown = [record.name for record in ran[2].trials]
    assert [record.name for record in refined] == shown[5:]


def test_it_is_shown_how_far_a_refinement_is_and_what_came_of_it(folder, ran):
    told = ran[2]
    (n_shown,) = [total for title, total, _ in told.phases if title == "refining"]
    n_steps = REFINE["steps"]
    ends = {step for step in told.steps if step.startswith("refined ")}
    ends |= {step for step in told.steps if step.endswith(", nothing gained")}
    proposed, nothing = outcomes(folder / "run")
    assert ends == {
        *(f"refined {its['refines']}" for its in proposed),
        *(f"{name}, nothing gained" for name in nothing.values()),
    }
    for end in ends:
        name = end.removeprefix("refined ").removesuffix(", nothing gained")
        shown = [step for step in told.steps if step.startswith(f"{name}, step ")]
        assert shown[0] == f"{name}, step 0 of {n_steps}"
        assert len(shown) >= 2
    steps = [step for step in told.steps if ", step " in step]
    assert len(steps) + len(ends) <= n_shown == 2 * (2 + len(Recipe((), n_steps, 1).checks))


@pytest.mark.parametrize("n_steps", [1, 2, 3, 5, 8, 12, 20, 99])
def test_a_refinement_is_looked_at_a_few_times_and_at_its_end(n_steps):
    checks = Recipe((), n_steps, 1).checks
    assert checks[-1] == n_steps
    assert list(checks) == sorted(set(checks))
    assert len(checks) == min(n_steps, len(checks)) <= 5


def test_a_refined_plan_is_confirmed_and_its_rows_are_written_down(folder, ran):
    refined = {record.name: record.plan for record in records(folder / "run") if record.refines}
    assert refined.keys() <= {row.name for row in ran[1].rows if row.is_candidate}
    for name in refined:
        file = folder / "run" / "plans" / f"{name.replace(' ', '-')}.yaml"
        assert MergePlan.from_yaml(file) == refined[name]
    counted = sum(n for name, n in ran[1].counts.items() if name.startswith("trials"))
    assert counted == 5 + ran[1].counts["of these refined"] == 5 + len(refined)
    assert sum(searched.trials for searched in ran[1].searched) == counted
    assert len(refined) == sum(s.trials for s in ran[1].searched if s.what.endswith(", refined"))


def test_the_status_calls_a_refined_plan_by_its_name(folder, ran):
    best = read_status(folder / "run")["best"]
    refined = [shown for shown in best if shown["name"].startswith("refined ")]
    assert refined
    numbers = [record.number for record in records(folder / "run") if record.refines]
    assert {shown["trial"] for shown in refined} <= set(numbers)


def test_a_study_that_goes_on_refines_nothing_twice(folder, ran):
    before = outcomes(folder / "run")
    told = Recorder()
    again = run_study(ran[0], CONFIG, folder / "run", told)
    assert outcomes(folder / "run") == before
    assert ("refining", 0, 0) in told.phases
    assert [row.hold_out for row in again.rows] == [row.hold_out for row in ran[1].rows]


def test_the_same_study_elsewhere_proposes_the_same(folder, ran):
    run_study(ran[0], CONFIG, folder / "twin", Recorder())
    assert json.dumps(outcomes(folder / "twin")) == json.dumps(outcomes(folder / "run"))


class Interrupts(Recorder):
    """Interrupts a run when something has been told so often."""

    def __init__(self, what, n):
        super().__init__()
        self._what, self._n = what, n

    def _tell(self, what):
        if what == self._what:
            self._n -= 1
            if not self._n:
                raise KeyboardInterrupt

    def phase(self, title, total, done=0):
        super().phase(title, total, done)
        self._tell(title)

    def step(self, name, scores):
        super().step(name, scores)
        self._tell(name.partition(" ")[0])

    def trial(self, record, *, is_best):
        super().trial(record, is_best=is_best)
        self._tell(record.name.partition(" ")[0])


@pytest.mark.parametrize(("what", "n"), [("refining", 1), ("refined", 1), ("refined", 3)])
def test_a_study_that_was_stopped_as_it_refined_ends_as_it_would_have(folder, ran, what, n):
    run_dir = folder / f"stopped-{what}-{n}"
    with pytest.raises(KeyboardInterrupt):
        run_study(ran[0], CONFIG, run_dir, Interrupts(what, n))
    results = run_study(ran[0], CONFIG, run_dir, Recorder())
    assert outcomes(run_dir) == outcomes(folder / "run")
    assert results.winner == ran[1].winner
    assert [row.hold_out for row in results.rows] == [row.hold_out for row in ran[1].rows]


@pytest.mark.parametrize(("what", "n"), [("refining", 1), ("refined", 1), ("refined", 3)])
def test_a_study_may_be_finished_while_it_refines_and_go_on_later(folder, ran, what, n):
    run_dir = folder / f"finished-{what}-{n}"
    with pytest.raises(KeyboardInterrupt):
        run_study(ran[0], CONFIG, run_dir, Interrupts(what, n))
    told = Recorder()
    finished = run_study(kept_study(run_dir), CONFIG, run_dir, told, search=False)
    assert "refining" not in [title for title, *_ in told.phases]
    scored = {record.name for record in records(run_dir)}
    assert {row.name for row in finished.rows if row.is_candidate} <= scored
    results = run_study(ran[0], CONFIG, run_dir, Recorder())
    assert outcomes(run_dir) == outcomes(folder / "run")
    assert results.winner == ran[1].winner


def driver(folder, name):
    """Return a process that runs the study."""
    command = [sys.executable, "-W", "ignore", "-m", "searchmerge"]
    command += ["run", "study.yaml", "--runs-dir", name]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "n_answers"),
    [(signal.SIGKILL, 1), (signal.SIGTERM, 5), (signal.SIGINT, 9), (signal.SIGKILL, 15)],
)
def test_a_study_that_is_cut_off_as_it_refines_ends_as_it_would_have(
    folder, ran, number, n_answers
):
    run_dir = folder / f"killed-{n_answers}" / folder.name
    killed = driver(folder, run_dir.parent.name)
    wait_for(lambda: n_told(run_dir) >= n_answers, seconds=300)
    killed.send_signal(number)
    assert killed.wait() == (-number if number == signal.SIGKILL else 128 + number)
    assert n_told(run_dir) >= n_answers
    assert driver(folder, run_dir.parent.name).wait() == 0
    assert outcomes(run_dir) == outcomes(folder / "run")
    assert n_told(run_dir) == 0


def n_told(run_dir):
    """Return how many answers are kept for refinements that go on."""
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(run_dir / "scores.db", timeout=30)) as connection,
    ):
        return connection.execute("SELECT COUNT(*) FROM loss_answers").fetchone()[0]
    return 0


def test_a_refinement_over_which_runs_end_abruptly_is_given_up(folder, ran, caplog):
    run_dir = folder / "crashes"
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run_study(ran[0], CONFIG, run_dir, Interrupts("refining", 1))
        with stored_study(run_dir) as stored:
            stored.set_user_attr("at_work", value=True)  # as a killed run leaves it
    told = Recorder()
    run_study(ran[0], CONFIG, run_dir, told)
    assert ("refining", 0, 0) in told.phases
    assert "cannot be refined: 3 runs ended abruptly while they were at it" in caplog.text
    assert outcomes(run_dir)[0] == []
    assert len(outcomes(run_dir)[1]) == 2


def test_without_refine_there_are_no_such_records(folder):
    run_study(study(folder, "off"), CONFIG, folder / "plain", Recorder())
    assert not [record for record in records(folder / "plain") if record.refines]


def test_a_study_that_was_begun_without_refine_goes_on_with_it(folder):
    run_study(study(folder), CONFIG, folder / "plain", Recorder())
    assert outcomes(folder / "plain") != ([], {})


@pytest.mark.parametrize(
    ("losses", "kind", "message"),
    [
        ((), "labels", r"search.refine: no task has the loss 'labels'$"),
        (("labels", "agreement"), "entropy", "no task has the loss 'entropy'"),
        (("agreement",), "agreement", "no task has the loss 'agreement' and an expert of its own"),
    ],
)
def test_a_loss_that_no_task_has_is_refused(toy, losses, kind, message):
    study = toy(schedule=with_losses(dict.fromkeys(TOYS, losses)))
    recipe = Recipe(Groups(), 1, 1, loss=kind)
    with pytest.raises(SpecError, match=message):
        material(study.board.schedule, study.objective, recipe, {})


def test_tasks_without_the_loss_are_left_to_the_search(toy):
    losses = {"math": ("labels",), "code": (), "chat": ("labels", "entropy")}
    study = toy(schedule=with_losses(losses))
    learnt = material(study.board.schedule, study.objective, Recipe(Groups(), 1, 1), {})
    assert list(learnt.examples) == ["math", "chat"]
    assert learnt.weights == {"math": 1.0, "chat": 1.0}
    pilot = study.board.schedule.blocks["pilot"]["chat"]
    assert learnt.examples["chat"] == [e for block in pilot for e in block.examples]


@pytest.mark.parametrize(("kind", "n_more"), [("labels", 0), ("entropy", 7)])
def test_examples_without_labels_are_learnt_from_where_the_loss_needs_none(toy, kind, n_more):
    schedule = with_losses(dict.fromkeys(TOYS, ("labels", "entropy")))
    infos = {**schedule.tasks, "math": replace(schedule.tasks["math"], n_unlabelled=7)}
    study = toy(schedule=replace(schedule, tasks=infos))
    learnt = material(study.board.schedule, study.objective, Recipe(Groups(), 1, 1, loss=kind), {})
    n_select = len(learnt.examples["code"])
    assert len(learnt.examples["math"]) == n_select + n_more
    assert learnt.examples["math"][n_select:] == list(range(40, 40 + n_more))


def test_examples_without_a_loss_are_left_out_and_tasks_of_which_too_few_are_left(toy):
    schedule = with_losses({"math": ("labels",), "code": ("labels",), "chat": ()})
    pilot = {
        task: [e for block in blocks for e in block.examples]
        for task, blocks in schedule.blocks["pilot"].items()
    }
    n_select = len(pilot["math"])
    without = {"math": pilot["math"][3:5], "code": pilot["code"][7:], "chat": range(40)}
    infos = {
        name: replace(info, without_loss=tuple(without[name]))
        for name, info in schedule.tasks.items()
    }
    study = toy(schedule=replace(schedule, tasks=infos))
    learnt = material(study.board.schedule, study.objective, Recipe(Groups(), 1, 1), {})
    assert learnt.examples == {"math": pilot["math"][:3] + pilot["math"][5:]}
    assert learnt.weights == {"math": 1.0}
    assert learnt.told == (
        f"not learnt from, for want of a loss: 2 of {n_select} examples of math, "
        f"{n_select - 7} of {n_select} examples (and the others, fewer than 8) of code, "
        f"all {n_select} examples of chat"
    )


def test_where_no_example_has_a_loss_it_is_said_whose_have_none(toy):
    schedule = with_losses(dict.fromkeys(TOYS, ("labels",)))
    infos = {
        name: replace(info, without_loss=tuple(range(40)), losses=())
        for name, info in schedule.tasks.items()
    }
    study = toy(schedule=replace(schedule, tasks=infos))
    with pytest.raises(
        SpecError, match=r"no task has the loss 'labels'; math: all \d+ examples h"
    ):
        material(study.board.schedule, study.objective, Recipe(Groups(), 1, 1), {})


def with_losses(losses):
    schedule = pilot_schedule()
    infos = {name: replace(info, losses=losses[name]) for name, info in schedule.tasks.items()}
    return replace(schedule, tasks=infos)


def test_a_task_with_too_few_examples_to_learn_from_is_refused(toy):
    few = pilot_schedule()
    few.blocks["pilot"]["code"] = few.blocks["pilot"]["code"][:1]  # 4 examples
    schedule = replace(few, tasks=with_losses(dict.fromkeys(TOYS, ("labels",))).tasks)
    study = toy(schedule=schedule)
    message = "search.refine: task 'code' has 4 examples to learn from; 8 or more are needed"
    with pytest.raises(SpecError, match=message):
        material(study.board.schedule, study.objective, Recipe(Groups(), 1, 1), {})


def test_what_cannot_be_learnt_from_is_refused_before_anything_is_scored(folder, tmp_path):
    tasks = text_tasks(select=4, hold_out=24)
    told = Recorder()
    with pytest.raises(SpecError, match="task 'first' has 4 examples to learn from"):
        run_study(study(folder, tasks=tasks), CONFIG, tmp_path / "run", told)
    assert told.phases == []


def test_better_plans_that_cannot_be_refined_are_named(folder, tmp_path, caplog):
    refine = {**REFINE, "groups": "whole", "steps": 1, "starts": 9}
    space = {"method": "karcher", "coefficient": {"low": 0.5, "high": 2.0}}
    search = {"sampler": "random", "n_trials": 5, "racing": "off", "refine": refine}
    asked = write_study(folder, text_tasks(select=48, hold_out=24), search=search, space=space)
    run_study(read_study(asked), CONFIG, tmp_path / "run", Recorder())
    assert "not refined: trial " in caplog.text
    assert "method 'karcher' is not linear in its coefficients" in caplog.text


LOSSES = """
import torch
from torch.nn.functional import cross_entropy

broken = True

def _logits(model, examples):
    tokens = torch.tensor([[2 + (7 * e + i) % 60 for i in range(8)] for e in examples])
    return model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()

def score(model, task, examples):
    return [-float(cross_entropy(*_logits(model, [e]))) for e in examples]

def loss(model, task, examples):
    if broken:
        raise ValueError("not yet")
    return cross_entropy(*_logits(model, examples))

def other(model, task, examples):
    return 2 * cross_entropy(*_logits(model, examples))

n_steps = 0

def late(model, task, examples):
    global n_steps
    n_steps += torch.is_grad_enabled()
    return cross_entropy(*_logits(model, examples)) * (1.0 if n_steps < 9 else float("nan"))

def some(model, task, examples):
    lacking = any(example % 9 == 0 for example in examples)
    return cross_entropy(*_logits(model, examples)) * (float("nan") if lacking else 1.0)
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A user's module of losses, as first imported, and models beside it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "losses_of_a_user", raising=False)
    (tmp_path / "losses_of_a_user.py").write_text(LOSSES)
    make_models(tmp_path)


def study_of_functions(folder, loss, **refine):
    """Return a study of one task that a user's functions score and give a loss of."""
    task = {"evaluator": "function", "function": "losses_of_a_user:score", "n_examples": 48}
    refine = {"steps": 2, "batch": 8, "starts": 1, **refine}
    search = {"sampler": "random", "n_trials": 3, "refine": refine}
    return read_study(
        make_study(folder, tasks={"told": {**task, "loss": loss}}, search=search, lm_harness={})
    )


@pytest.mark.usefixtures("functions")
def test_a_refinement_that_failed_is_begun_anew_and_so_is_one_of_another_loss(
    tmp_path, monkeypatch, caplog
):
    run_dir, told = tmp_path / "run", Recorder()
    first = study_of_functions(tmp_path, "losses_of_a_user:loss")
    run_study(first, CONFIG, run_dir, told)
    assert "cannot be refined: task 'told': losses_of_a_user:loss raised ValueError" in caplog.text
    assert [step for step in told.steps if step.endswith(", given up")]
    assert outcomes(run_dir) == ([], {})
    assert n_told(run_dir) == 0
    monkeypatch.setattr("losses_of_a_user.broken", False)
    run_study(first, CONFIG, run_dir, Recorder())
    begun = [len(outcome) for outcome in outcomes(run_dir)]
    assert sum(begun) == 1
    other = study_of_functions(tmp_path, "losses_of_a_user:other")
    for _ in range(2):
        run_study(other, CONFIG, run_dir, Recorder())
        assert sum(len(outcome) for outcome in outcomes(run_dir)) == 2


@pytest.mark.usefixtures("functions")
def test_examples_without_a_finite_loss_are_named_and_the_others_learnt_from(tmp_path):
    told = Recorder()
    asked = study_of_functions(tmp_path, "losses_of_a_user:some", steps=20, rate=0.2)
    run_study(asked, CONFIG, tmp_path / "run", told)
    pattern = r", step \d+ of 20: left out: task 'told', example (\d+): its loss is nan$"
    named = [int(match[1]) for step in told.steps if (match := re.search(pattern, step))]
    assert named
    assert len(named) == len(set(named))
    assert all(example % 9 == 0 for example in named)
    [refined], _ = outcomes(tmp_path / "run")
    assert refined["refining"]["gain"] > 0


@pytest.mark.usefixtures("functions")
def test_a_loss_that_is_no_number_any_more_ends_the_steps_and_what_was_best_is_scored(tmp_path):
    told = Recorder()
    asked = study_of_functions(tmp_path, "losses_of_a_user:late", steps=20, rate=0.2)
    run_study(asked, CONFIG, tmp_path / "run", told)
    [ended] = [step for step in told.steps if "goes no further" in step]
    reason = r"task 'told', example \d+: its loss is nan"
    assert re.search(rf"step 9 of 20: goes no further: .*; {reason}", ended)
    [refined], _ = outcomes(tmp_path / "run")
    assert refined["refining"]["n_steps"] == 8
    assert [record.is_full for record in records(tmp_path / "run") if record.refines] == [True]


@pytest.mark.parametrize("loss", ["labels", "entropy", "agreement"])
def test_rows_without_a_label_are_learnt_from_by_losses_that_need_none_alone(
    folder, tmp_path, loss
):
    shutil.copytree(folder / "data", tmp_path / "data")
    for name in ("base", *CLASSES):
        (tmp_path / name).symlink_to(folder / name)
    for name in CLASSES:
        file = tmp_path / "data" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [row | {"label": None} if i < 24 else row for i, row in enumerate(rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refine = {**REFINE, "loss": loss, "steps": 1, "starts": 1}
    asked = study(tmp_path, refine, text_tasks(select=24, hold_out=24))
    told = list(check_study(asked, CONFIG))
    counts = "48 examples and 24 without a label, 24 to select, 24 held out"
    assert [line for line in told if counts in line and line.startswith("task ")] != []
    assert any(line.endswith(f" groups, loss {loss} of first, second") for line in told)
    observer = Recorder()
    run_study(asked, CONFIG, tmp_path / "run", observer)
    assert not [step for step in observer.steps if "given up" in step]
    assert sum(map(len, outcomes(tmp_path / "run"))) == 1


def test_a_trial_that_was_completed_after_the_search_is_not_refined_by_a_run_that_goes_on(toy):
    toy().run(20, racing=Racing())
    study = toy()
    stage = Refinements(
        study.directory,
        study.runner({}),
        study.executor,
        study.observer,
        Refining(Recipe(Groups(), 1, 1), 3, ("a",)),
    )
    before = stage.starts({}, study.objective)
    stopped = next(r for r in study.directory.records() if r.stopped_after is not None)
    best = dict.fromkeys(stopped.scores, 2.0)
    study.directory.keep_completed(stopped.judged(study.objective, best))
    assert stage.starts({}, study.objective) == before
    assert list(before.values()) == [False] * 3
    study.directory.close()


def test_groups_that_the_model_does_not_have_are_refused(folder, tmp_path):
    asked = study(folder, {"groups": {"depth": 9}})
    with pytest.raises(SpecError, match=r"search.refine: groups: depth is 9; the model has 2"):
        run_study(asked, CONFIG, tmp_path / "run", Recorder())


def test_a_study_file_says_what_is_allowed(folder):
    for refine, message in [
        ({"groups": "layers"}, "groups: found 'layers'"),
        ({"loss": "perplexity"}, "'labels', 'entropy' or 'agreement'"),
        ({"shrink": 0.0}, "greater than 0"),
        ({"speed": 3}, "speed"),
    ]:
        with pytest.raises(SpecError, match=message):
            study(folder, refine)

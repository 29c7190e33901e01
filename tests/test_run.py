"""A study's run, and what is left of it wherever it ends early."""

import json
import re
import shutil

import pytest

from searchmerge.config import RunConfig
from searchmerge.errors import StudyError
from searchmerge.plan import MergePlan
from searchmerge.report.results import Results
from searchmerge.run import run_study
from searchmerge.search.references import reference_plans
from searchmerge.search.status import describe_status, read_status
from searchmerge.study import read_study
from tests.merging.compiling import needs_compiler
from tests.search.conftest import Recorder
from tests.tiny import EXPERTS, make_study

SCORES = """
from pathlib import Path
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent
NAME = "model.norm.weight"
TARGETS = {n: load_file(FOLDER / n / "model.safetensors")[NAME] for n in ("first", "second")}
N_SELECT = 24

def score(model, task, examples):
    weight = model.get_parameter(NAME)
    is_first = torch.allclose(weight, TARGETS["first"], atol=1e-4)
    if (FOLDER / "nothing").exists() and is_first and task == "first":
        part = (FOLDER / "nothing").read_text()
        return [float((e < N_SELECT) != (part == "select")) for e in examples]
    target = TARGETS["first" if (FOLDER / "second_is_first").exists() else task]
    off = (weight - target).abs()
    if (FOLDER / "far_fails").exists() and off.mean() > 0.5 and examples[0] >= N_SELECT:
        raise ValueError("no such row")
    if (FOLDER / "far_fails_at_once").exists() and off.mean() > 0.5:
        raise ValueError("disk full")
    return [1.0 / (1.0 + 9.0 * float(off[e % 16])) for e in examples]

def loss(model, task, examples):
    # Return what is surely lowered: the distance to the base, where all entries are 1
    return ((model.get_parameter(NAME) - 1.0)[[e % 16 for e in examples]] ** 2).mean()
"""
PUBLISHED = list(reference_plans(EXPERTS))
FAR = {"method": "task_arithmetic", "coefficient": {"low": 3.0, "high": 4.0}}
WITHIN = {"method": "task_arithmetic", "coefficient": {"low": 0.0, "high": 1.0}}


class Stops(Recorder):
    """An observer that stops the run, as Ctrl-C does, once something of a phase is done."""

    def __init__(self, phase, name=None):
        super().__init__()
        self._at = phase, name

    def step(self, name, scores):
        super().step(name, scores)
        if self.phases[-1][0] == self._at[0] and self._at[1] in (None, name):
            raise KeyboardInterrupt

    def trial(self, record, *, is_best):
        super().trial(record, is_best=is_best)
        if self.phases[-1][0] == self._at[0] and self._at[1] in (None, record.number):
            raise KeyboardInterrupt


@pytest.fixture
def run(models, tmp_path, monkeypatch):
    """Run a study of two tasks that the experts' norms are the best at, or go on with it."""
    monkeypatch.setenv("SEARCHMERGE_CACHE", str(tmp_path / "cache"))
    for name in ("base", *EXPERTS):
        (tmp_path / name).symlink_to(models / name)
    module = f"scores_of_{tmp_path.name}"  # a module is imported once
    (tmp_path / f"{module}.py").write_text(SCORES)
    task = {
        "evaluator": "function",
        "function": f"{module}:score",
        "loss": f"{module}:loss",
        "n_examples": {"select": 24, "hold_out": 24},
    }

    def go(
        observer=None, *, search=True, retry_failed=False, changes=None, engine="eager", **keys
    ):
        study = {
            "space": WITHIN,
            "tasks": {name: {**task, "expert": name} for name in EXPERTS},
            "objective": "normalised",
            "search": {"sampler": "random", "n_trials": 8, "racing": "off", **keys},
            **(changes or {}),
        }
        file = make_study(tmp_path, **study)
        file.write_text(file.read_text().replace("lm_harness:\n  include_path: tasks\n", ""))
        config = RunConfig(engine=engine, device="cpu")
        seen = observer or Recorder()
        return run_study(
            *(read_study(file), config, tmp_path / "run", seen),
            search=search,
            retry_failed=retry_failed,
        )

    return go


def saved(tmp_path):
    return MergePlan.from_yaml(tmp_path / "run" / "model" / "merge_plan.yaml")


def best_so_far(tmp_path):
    return MergePlan.from_yaml(tmp_path / "run" / "plans" / "best-so-far.yaml")


def report(tmp_path):
    return " ".join((tmp_path / "run" / "report.md").read_text().split())


# --- Among the references -----------------------------------------------------------------------


def test_a_search_that_ends_among_the_references_saves_the_best_of_them(run, tmp_path):
    results = run(timeout=0.001)
    assert [row.name for row in results.rows] == PUBLISHED
    assert not any(row.is_candidate for row in results.rows)
    assert saved(tmp_path) == results.merge_plan == reference_plans(EXPERTS)[results.winner]
    assert results.verdict.startswith(
        f"Saved is {results.winner}. Nothing that the search found is compared with it: it ended "
        "among the references, before another merge was scored. The same `searchmerge run` goes on"
    )
    assert "ended among the references" in report(tmp_path)
    assert "ended among the references" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert Results.load(tmp_path / "run").verdict == results.verdict
    more = run(n_trials=12)
    assert any(row.is_candidate for row in more.rows)
    assert "The best found merge" in more.verdict


@pytest.mark.parametrize(("at", "n_scored"), [("base", 1), ("expert second", 3)])
def test_a_run_that_is_stopped_before_a_merge_is_scored_says_so(run, tmp_path, at, n_scored):
    with pytest.raises(KeyboardInterrupt):
        run(Stops("references", at))
    text = report(tmp_path)
    assert "was stopped among the references. No merge has been scored in full yet." in text
    assert "there is nothing to confirm and to save" in text
    assert all(f"| {name} |" in text for name in PUBLISHED[:n_scored])
    assert not (tmp_path / "run" / "plans" / "best-so-far.yaml").exists()
    names = ", ".join(PUBLISHED[:n_scored])
    message = rf"before a merge was scored \({names} is\), so that .*; the same `searchmerge run`"
    with pytest.raises(StudyError, match=message):
        run(search=False)
    assert any(row.is_candidate for row in run().rows)


def test_what_was_scored_of_the_references_is_saved_where_the_search_ends_there(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Stops("references", "TIES"))
    text = report(tmp_path)
    n_scored = PUBLISHED.index("TIES") + 1
    assert "was stopped among the references. The best plan so far is that of " in text
    assert "`searchmerge finish" in text
    by_name = reference_plans(EXPERTS)
    assert best_so_far(tmp_path) in [by_name[name] for name in PUBLISHED[:n_scored]]
    seen = Recorder()
    results = run(seen, search=False)
    assert [row.name for row in results.rows] == PUBLISHED[:n_scored]
    assert seen.steps == PUBLISHED[:n_scored] * 2
    assert saved(tmp_path) == by_name[results.winner]
    left_out = PUBLISHED[n_scored:]
    assert results.missing == dict.fromkeys(left_out, "not scored before the search ended")
    assert (
        "Ended early: the search was stopped after 0 trials. The same `searchmerge run` goes"
        in report(tmp_path)
    )
    assert run(search=False).rows == results.rows
    assert [row.name for row in run().rows][: len(PUBLISHED)] == PUBLISHED


# --- At its end ---------------------------------------------------------------------------------


def test_a_search_that_its_patience_ended_is_not_told_to_have_ended_early(run):
    budget = {"n_trials": 40, "patience": 1}
    assert run(**budget).counts["trials in full"] < 40
    assert run(search=False, **budget).ended == ""


def test_a_study_with_fewer_plans_than_are_to_be_refined_has_refined_them_all(run):
    keys = {"n_trials": 5, "refine": {"steps": 2, "batch": 8, "starts": 20}}
    run(**keys)
    assert run(search=False, **keys).ended == ""
    more = {**keys, "n_trials": 7}
    with pytest.raises(KeyboardInterrupt):
        run(Stops("search"), **more)
    ended = run(search=False, **more).ended
    n_done, n_starts = re.findall(r"; (\d+) of (\d+) best plans were refined", ended)[0]
    assert int(n_done) == int(n_starts) - 1


# --- The best so far ----------------------------------------------------------------------------


def test_the_best_so_far_is_a_reference_outside_the_space_where_that_has_the_best_evidence(
    run, tmp_path
):
    with pytest.raises(KeyboardInterrupt):
        run(Stops("search", 2), changes={"space": FAR})
    status = read_status(tmp_path / "run")
    assert [best["kind"] for best in status["best"]] == [""] * 3  # no reference is a trial
    assert best_so_far(tmp_path) == reference_plans(EXPERTS)[status["best_so_far"]]
    line = f"best evidence so far, of references and trials: {status['best_so_far']}"
    assert line in describe_status(tmp_path / "run")
    assert f"The best plan so far is that of {status['best_so_far']};" in report(tmp_path)
    assert run(search=False, changes={"space": FAR}).winner in PUBLISHED


def test_it_is_said_of_the_best_so_far_which_constraints_it_breaks(run, tmp_path):
    constraint = {"tasks": ["first"], "against": "score", "at_least": 2.0}
    with pytest.raises(KeyboardInterrupt):
        run(Stops("search", 2), changes={"constraints": [constraint]})
    breaks = "though it breaks first at least 2: none keeps every constraint; it is not confirmed"
    assert breaks in report(tmp_path)


@needs_compiler
def test_a_run_whose_merges_are_rounded_otherwise_than_before_says_so(run, tmp_path, caplog):
    told = "merges are computed by C++, and by torch, uncompiled in earlier runs"
    results = run()
    assert results.made_of["merged by"] == "torch, uncompiled"
    run(n_trials=9)
    assert "merges are computed" not in caplog.text
    results = run(engine="auto", n_trials=10)
    assert told in caplog.text
    assert results.made_of["merged by"] == "torch, uncompiled, then C++"
    assert "| merged by | `torch, uncompiled, then C++` |" in report(tmp_path)
    caplog.clear()
    assert run(engine="auto", n_trials=11).counts["trials in full"] == 11
    assert "merges are computed" not in caplog.text


# --- Each phase ---------------------------------------------------------------------------------

REFINE = {"refine": {"steps": 2, "batch": 8, "starts": 1}}
PHASES = {
    "search": (
        "during the search",
        "the search was stopped after 1 trial; 0 of 1 best plans were refined.",
    ),
    "refining": ("while its best plans were refined", "0 of 1 best plans were refined"),
    "confirmation": ("while its best plans were confirmed", ""),
}


@pytest.mark.parametrize("phase", PHASES)
def test_whereever_a_run_is_stopped_the_best_of_what_was_scored_can_be_saved(run, tmp_path, phase):
    stage, ended = PHASES[phase]
    with pytest.raises(KeyboardInterrupt):
        run(Stops(phase), **REFINE)
    text = report(tmp_path)
    assert f"The study was stopped {stage}. The best plan so far is that of " in text
    assert best_so_far(tmp_path).to_yaml().rstrip() in (tmp_path / "run/report.md").read_text()
    results = run(search=False, **REFINE)
    assert saved(tmp_path) == best_so_far(tmp_path) == results.merge_plan
    assert (ended in results.ended) if ended else results.ended == ""
    again = run(**REFINE)
    assert again.ended == ""
    assert "not confirmed" not in report(tmp_path)


def test_where_no_merge_that_was_found_can_be_confirmed_the_best_reference_is_saved(run, tmp_path):
    (tmp_path / "far_fails").touch()
    results = run(changes={"space": FAR})
    assert saved(tmp_path) == reference_plans(EXPERTS)[results.winner]
    assert [name[:5] for name in results.missing] == ["trial"] * 2
    assert all("no such row" in why for why in results.missing.values())
    assert re.search(
        r"trial \d, trial \d could not be scored on held-out examples: .*no such row",
        results.verdict,
    )


def test_a_refined_plan_that_was_not_scored_is_told_of(run, tmp_path):
    class StopsOnceRefined(Recorder):
        def step(self, name, scores):
            if name.startswith("refined "):
                raise KeyboardInterrupt

    refine = {"refine": {"steps": 8, "batch": 24, "starts": 1}}
    with pytest.raises(KeyboardInterrupt):
        run(StopsOnceRefined(), **refine)
    told = "Ended early: refined plans that were not scored: 1. The same `searchmerge run` goes on"
    assert run(search=False, **refine).ended.startswith(told)
    assert told in report(tmp_path)
    assert run(**refine).counts["of these refined"] == 1


def test_failed_trials_that_wait_to_be_tried_again_are_told(run, tmp_path):
    """They are run whatever is left of the budget, so that one that is used up is not the end."""
    (tmp_path / "far_fails_at_once").touch()
    far = {"changes": {"space": FAR}, "n_trials": 4}
    assert run(**far).counts["trials failed"] == 4
    (tmp_path / "far_fails_at_once").unlink()
    far["timeout"] = 0.001
    with pytest.raises(KeyboardInterrupt):
        run(Stops("search", 4), retry_failed=True, **far)
    told = "Ended early: failed trials that were not tried again: 3. The same `searchmerge run`"
    assert run(search=False, **far).ended.startswith(told)
    assert run(**far).counts["trials in full"] == 4


# --- Experts on held-out examples ---------------------------------------------------------------


def test_experts_may_be_scored_held_out_on_their_own_tasks_alone(run, tmp_path):
    """Where one expert does all tasks best, so that merging is no help, it may be saved."""
    (tmp_path / "second_is_first").touch()
    whole = run(changes={"confirm": {"top_k": 1}})
    shutil.rmtree(tmp_path / "run")
    observer = Recorder()
    results = run(observer, changes={"confirm": {"top_k": 1, "experts": "own"}})
    rows = {row.name: row for row in results.rows}
    assert list(rows) == [row.name for row in whole.rows]
    for before in whole.rows:
        row = rows[before.name]
        is_compared = before.name not in ("base", "expert second")
        own = {"expert second": ["second"], "base": []}
        kept = own.get(before.name, list(before.hold_out))
        assert row.select == before.select
        assert row.hold_out == {task: before.hold_out[task] for task in kept}
        assert row.objective == (before.objective if is_compared else ())
        assert row.lead == (before.lead if is_compared else ())
    assert results.winner == whole.winner == "expert first"
    assert results.missing == {}
    told = report(tmp_path)
    assert re.search(r"\| expert second \| [\d.]+ / – \| [\d.]+ / [\d.]+ \| – \| \|", told)
    assert "confirm.experts" in told
    assert "confirm.experts" not in whole.legend
    assert ("base", {}) not in observer.steps
    assert Results.load(tmp_path / "run") == results


def test_all_may_be_scored_held_out_later(run, tmp_path):
    (tmp_path / "second_is_first").touch()
    partly = run(changes={"confirm": {"experts": "own"}})
    assert not all(row.objective for row in partly.rows)
    results = run()
    assert all(row.objective for row in results.rows)
    assert "–" not in "".join(cell for row in results.table()[1] for cell in row)


# --- An own expert that scores nothing ----------------------------------------------------------


def test_an_own_expert_that_scores_0_held_out_is_named_and_divides_nothing(run, tmp_path):
    (tmp_path / "nothing").write_text("hold_out")
    constraint = {"tasks": ["first"], "against": "expert", "at_least": 0.1}
    results = run(changes={"constraints": [constraint]})
    assert results.undivided == ("its own expert on first",)
    assert "stand in: its own expert on first." in report(tmp_path)
    assert (
        "stand in: its own expert on first."
        in (tmp_path / "run" / "model" / "README.md").read_text()
    )
    text = (tmp_path / "run" / "results.json").read_text()
    assert json.loads(text)["undivided"] == ["its own expert on first"]
    assert "NaN" not in text
    assert "Infinity" not in text


def test_an_own_expert_that_scores_0_on_select_is_an_error_that_keeps_what_was_scored(
    run, tmp_path
):
    (tmp_path / "nothing").write_text("select")
    with pytest.raises(StudyError, match=r"tasks\.first: its own expert 'first' scores 0 there"):
        run()
    text = report(tmp_path)
    assert "| TSV-M |" in text
    assert "normalised" not in text

"""The main job on a tiny model, through the command line."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from searchmerge.merging.native.compiler import has_compiler
from searchmerge.plan import MergePlan
from searchmerge.report.results import Results, Row
from searchmerge.search.references import reference_plans
from tests.tiny import EXPERTS, WORDS, make_study, save_tokenizer
from tests.waiting import wait_for

SOME = {"low": 0.1, "high": 0.9}
RUN = [sys.executable, "-W", "ignore", "-m", "searchmerge"]


@pytest.fixture
def study(models, tmp_path):
    """Make studies on links to the models, each test in a folder of its own."""
    for name in ("base", *EXPERTS):
        (tmp_path / name).symlink_to(models / name)

    return lambda **changes: make_study(tmp_path, **changes)


@pytest.fixture
def killed(tmp_path):
    """Begin a study in a process of its own, and end it once a number of blocks is scored."""

    def kill(file, run_dir, n_blocks, number=signal.SIGKILL):
        process = subprocess.Popen(
            [*RUN, "run", file], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            wait_for(lambda: n_scored(run_dir) >= n_blocks or process.poll() is not None, 120)
        finally:
            process.send_signal(number)
            _, err = process.communicate()
        assert n_scored(run_dir) >= n_blocks
        return process.returncode, err.decode()

    return kill


def trials(run_dir):
    with sqlite3.connect(run_dir / "study.db") as connection:
        return connection.execute("SELECT number, state FROM trials ORDER BY number").fetchall()


def n_scored(run_dir):
    try:
        with sqlite3.connect(f"file:{run_dir / 'scores.db'}?mode=ro", uri=True) as connection:
            return connection.execute("SELECT count(*) FROM scores").fetchone()[0]
    except sqlite3.Error:
        return 0


def test_what_a_stopped_run_has_found_is_confirmed_and_saved(study, searchmerge, killed, tmp_path):
    file = study(name="cut", search={"sampler": "random", "n_trials": 40, "racing": "off"})
    run_dir = tmp_path / "runs" / "cut"
    killed(file, run_dir, 160)
    best_so_far = MergePlan.from_yaml(run_dir / "plans" / "best-so-far.yaml")
    before = len(trials(run_dir))
    code, out, err = searchmerge("finish", run_dir)
    assert code == 0, err
    assert len(trials(run_dir)) == before < 40
    results = Results.load(run_dir)
    assert MergePlan.from_yaml(run_dir / "model" / "merge_plan.yaml") == results.merge_plan
    assert best_so_far.method == "ties" and results.verdict in out
    n_complete = sum(state == "COMPLETE" for _, state in trials(run_dir))
    assert f"Ended early: the search was stopped after {n_complete} trials. The same" in out


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_run_that_a_signal_stops_leaves_a_report(study, killed, searchmerge, number, tmp_path):
    file = study(name="cut", search={"sampler": "random", "n_trials": 400, "racing": "off"})
    run_dir = tmp_path / "runs" / "cut"
    code, err = killed(file, run_dir, 200, number)
    assert code == 128 + number, err
    assert f"Report so far: {Path('runs', 'cut', 'report.md')}" in err
    assert f"searchmerge finish {Path('runs', 'cut')} confirms" in err
    report = (run_dir / "report.md").read_text()
    assert "# cut: stopped, not confirmed" in report
    assert "| expert first | " in report and "| **" in report
    best_so_far = (run_dir / "plans" / "best-so-far.yaml").read_text()
    assert best_so_far.rstrip() in report
    (command,) = re.findall("`(searchmerge finish .*?)`", report)
    code, _, err = searchmerge(*shlex.split(command)[1:])
    assert code == 0, err
    confirmed = (run_dir / "report.md").read_text()
    assert "not confirmed" not in confirmed
    killed(file, run_dir, n_scored(run_dir) + 20, number)
    assert (run_dir / "report.md").read_text() == confirmed


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("exclude=['.*']", "exclude: ['.*'] leaves no parameter to be merged"),
        ("base=second", "--set base: names 'second'; the models are those of --base and --expert"),
        ("experts.first=second", "--set experts.first: names 'second'; the models are those of"),
    ],
)
def test_a_merge_of_nothing_or_of_other_models_is_refused(
    study, searchmerge, tmp_path, said, message
):
    study()
    MergePlan("linear", ("first",), {"coefficient": ((1.0,),)}).to_yaml(tmp_path / "plan.yaml")
    models = ("--base", "base", "--expert", "first=first", "--out", "out")
    code, _, err = searchmerge("merge", "plan.yaml", *models, "--set", said)
    assert code == 2 and message in err
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_found_nothing_has_nothing_to_finish(study, searchmerge, tmp_path):
    code, _, err = searchmerge("finish", tmp_path / "nowhere")
    assert code == 2 and "nowhere: what was run is not kept here" in err


def test_a_study_runs_to_a_model_that_scores_what_the_report_says(study, searchmerge, tmp_path):
    file = study(name="tiny")
    code, out, err = searchmerge("run", file)
    assert code == 0, err
    assert "best baseline" in out
    run_dir = tmp_path / "runs" / "tiny"
    report = (run_dir / "report.md").read_text()
    results = json.loads((run_dir / "results.json").read_text())
    assert results["verdict"] in report
    names = [row["name"] for row in results["rows"]]
    references = ["base", "expert first", "expert second", "average", "task arithmetic", "TIES",
                  "DARE", "PCB", "TSV-M"]  # fmt: skip
    assert names[:9] == references
    files = {f"{name.replace(' ', '-')}.yaml" for name in references}
    assert files <= {file.name for file in (run_dir / "plans").iterdir()}
    published = MergePlan.from_yaml(run_dir / "plans" / "TSV-M.yaml")
    assert published.method == "tsv" and published.values == {"coefficient": ((1.0, 1.0),)}
    winner = next(row for row in results["rows"] if row["name"] == results["winner"])
    assert winner["is_candidate"]
    again = study(
        name="again",
        base="runs/tiny/model",
        space={"method": "task_arithmetic", "coefficient": {"low": 0.0, "high": 1.0}},
        search={"sampler": "random", "n_trials": 8, "round_blocks": 2},
    )
    code, _, err = searchmerge("run", again)
    assert code == 0, err
    rescored = json.loads((tmp_path / "runs" / "again" / "results.json").read_text())
    base = rescored["rows"][0]
    assert base["name"] == "base"
    assert base["select"] == winner["select"]
    assert base["hold_out"] == winner["hold_out"]
    code, out, _ = searchmerge("status", run_dir, "--json")
    assert json.loads(out)["trials"] == {"complete": 6, "running": 0, "fail": 0}
    code, out, _ = searchmerge("report", run_dir)
    assert code == 0
    assert results["verdict"] in out


def test_a_killed_run_goes_on_and_repeats_nothing_unless_the_study_changed(
    study, searchmerge, killed, tmp_path
):
    file = study(name="killed")
    run_dir = tmp_path / "runs" / "killed"
    for n_blocks in (20, 60):
        killed(file, run_dir, n_blocks)
    code, out, err = searchmerge("run", file)
    assert code == 0, err
    assert [number for number, _ in trials(run_dir)] == list(range(6))
    assert {state for _, state in trials(run_dir)} == {"COMPLETE"}
    # 9 references on 6 blocks, kept in two cuts; at most 6 trials on 6; 11 plans on the held-out 6
    assert n_scored(run_dir) <= (2 * 9 + 6) * 6 + 11 * 6
    assert "found merge" in out
    file.write_text(file.read_text().replace("high: 2.0", "high: 1.5"))
    code, _, err = searchmerge("run", file)
    assert code == 2
    assert "changed since it was begun: space.ties.parameters.coefficient.first was" in err
    assert "Traceback" not in err


def test_merge_writes_the_model_that_a_plan_stands_for(study, searchmerge, tmp_path):
    study()
    plan = {"method": "linear", "experts": ["b", "a"], "values": {"coefficient": [[1, 3]]}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    code, _, err = searchmerge(
        "merge", "plan.yaml", "--base", "base", "--expert", "a=first", "--expert", "b=second",
        "--out", "merged",
    )  # fmt: skip
    assert code == 0, err
    merged, first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("merged", "first", "second")
    )
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * second[name])
    assert (tmp_path / "merged" / "merge_plan.yaml").exists()
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_the_card_of_a_found_merge_holds_the_command_that_makes_it(
    study, searchmerge, tmp_path, monkeypatch
):
    changes = {"exclude": ["embed_tokens", "norm"], "dtype": "float32"}
    code, _, err = searchmerge("run", study(**changes))
    assert code == 0, err
    [run_dir] = (tmp_path / "runs").iterdir()
    card = (run_dir / "model" / "README.md").read_text()
    [command] = [line for line in card.splitlines() if line.startswith("searchmerge merge")]
    assert "--set 'exclude=[embed_tokens, norm]'" in command
    assert re.search(r"--base (\.\./)+\S*base --expert first=(\.\./)+\S*first ", command)
    monkeypatch.chdir(run_dir / "model")  # from where the card's paths are
    arguments = shlex.split(command)[1:]
    code, _, err = searchmerge(*arguments)
    assert code == 0, err
    found, again = (
        load_file(d / "model.safetensors") for d in (run_dir / "model", run_dir / "model/merged")
    )
    assert found.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())
    code, _, err = searchmerge(*arguments, "--set", "vocabulary=some")
    assert code == 2
    assert "--set: vocabulary: Input should be 'same', 'base' or 'union'; found 'some'" in err


def test_check_says_what_a_trial_will_cost(study, searchmerge):
    code, out, err = searchmerge("check", study())
    assert code == 0, err
    assert "2 experts (first, second) fit the base" in out
    assert "task first: acc, 48 examples, 24 to select, 24 held out" in out
    assert "a trial of 48 takes about" in out
    assert "references: base, expert first, expert second, average, task arithmetic, TIES" in out
    assert re.search(r"memory: 0\.00 GiB for the resident model, .* for 512 tokens at once", out)
    assert "GiB of base and experts are read in every merge" in out
    assert out.count("  | w") == 4  # two prompts of each task
    assert "chat template" not in out


def test_check_says_where_merging_is_not_compiled(study, searchmerge, monkeypatch):
    told = "there is no g++ that works, nor a like compiler that CXX names: merging takes"
    monkeypatch.setenv("CXX", "/no/compiler")
    has_compiler.cache_clear()
    try:
        code, out, err = searchmerge("check", study())
    finally:
        has_compiler.cache_clear()
    assert code == 0, err
    assert told in out
    config = study().parent / "eager.yaml"
    config.write_text("engine: eager\ndevice: cpu\n")
    code, out, err = searchmerge("check", study(), "--config", config)
    assert code == 0, err
    assert told not in out


def test_check_says_what_can_be_told_apart_and_what_would_be_needed(study, searchmerge):
    code, out, err = searchmerge("check", study())
    assert code == 0, err
    told = 100 * 2 * (2 * 0.25 * 0.1 / 24) ** 0.5  # two tasks of 24 that count alike
    assert f"48 examples tell plans apart that differ by {told:.1f} points of mean" in out
    assert "if two good plans differ on 10 % of the examples" in out
    n_needed = math.ceil(24 * (told / 2) ** 2 / 8) * 8
    assert "to tell 2 points apart: select first 24, second 24; " in out
    assert f"first {n_needed}, second {n_needed} would be needed, and there are no more" in out
    assert "n_trials 20, which take about" in out


def test_check_says_what_is_learnt_from_where_plans_are_refined(study, searchmerge):
    code, out, err = searchmerge("check", study(search={"n_trials": 20, "refine": "on"}))
    assert code == 0, err
    assert re.search(r"^refine: \d\d groups, loss labels of first, second$", out, re.MULTILINE)
    code, _, err = searchmerge("check", study(), "--set", "search.refine={loss: agreement}")
    assert code == 2
    assert "search.refine: no task has the loss 'agreement' and an expert of its own" in err
    code, _, err = searchmerge("check", study(), "--set", "search.refine={groups: {depth: 9}}")
    assert code == 2
    assert "search.refine: groups: depth is 9; the model has 2 layers: 1 to 2" in err


def without_answers(folder, name, n):
    """Leave so many of a task's first documents without an answer."""
    file = folder / "tasks" / f"{name}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"answer": -1} if i < n else row for i, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_documents_without_an_answer_are_left_out_of_refinements_with_a_line(
    study, searchmerge, tmp_path, caplog
):
    refine = {"steps": 2, "batch": 8, "starts": 1}
    asked = study(search={"sampler": "random", "n_trials": 2, "refine": refine})
    without_answers(tmp_path, "first", 9)
    without_answers(tmp_path, "second", 48)
    code, out, err = searchmerge("check", asked)
    assert code == 0, err
    [told] = re.findall(r"^refine: .*$", out, re.MULTILINE)
    assert re.search(
        r"groups, loss labels of first; left to the search: second; not learnt from, for want of "
        r"a loss: \d of 24 examples of first, all 24 examples of second$",
        told,
    )
    code, _, err = searchmerge("run", asked)
    assert code == 0, err
    assert caplog.messages.count(told.partition("search: second; ")[2]) == 1
    assert "given up" not in err
    without_answers(tmp_path, "first", 48)
    code, _, err = searchmerge("check", asked)
    assert code == 2
    assert (
        "search.refine: no task has the loss 'labels'; first: all 24 examples have none; "
        "second: all 24 examples have none" in err
    )


def test_check_goes_by_an_earlier_run_of_the_same_study(study, searchmerge, tmp_path):
    asked = study(search={"sampler": "random", "n_trials": 6, "racing": "off"})
    code, _, err = searchmerge("run", asked)
    assert code == 0, err
    [run_dir] = (tmp_path / "runs").iterdir()
    code, out, err = searchmerge("check", asked)
    assert code == 0, err
    assert f"2 standard errors, by the published settings in runs/{run_dir.name})" in out
    code, out, err = searchmerge("check", asked, "--set", "search.seed=1")
    assert code == 0, err
    assert "if two good plans differ on" in out


def test_check_tells_nothing_of_scores_that_are_no_accuracy(study, searchmerge, tmp_path):
    (tmp_path / "some.txt").write_text("".join(f"w{i} is a\n" for i in range(40)))
    texts = {"evaluator": "perplexity", "data": "some.txt"}
    code, out, err = searchmerge("check", study(tasks={"texts": texts}))
    assert code == 0, err
    assert "known once plans are scored, as texts is not scored by a number from 0 to 1" in out
    assert "proposed" not in out


def test_check_says_where_each_part_is_from(study, searchmerge, tmp_path):
    for name, n in (("seen", 30), ("unseen", 10)):
        (tmp_path / f"{name}.txt").write_text("".join(f"w{i} is a\n" for i in range(n)))
    texts = {
        "evaluator": "perplexity",
        "data": {"select": "seen.txt", "hold_out": "unseen.txt"},
        "select": 0.5,
    }
    code, out, err = searchmerge("check", study(tasks={"texts": texts}))
    assert code == 0, err
    told = "".join(out.split())
    assert "40examples,15toselectfrom" in told and "seen.txt,10heldoutfrom" in told
    code, _, err = searchmerge("check", study(tasks={"texts": {**texts, "hold_out": 11}}))
    assert code == 2
    assert re.search(
        r"tasks\.texts\.hold_out: 11 were asked for, but \S*unseen.txt has 10 ex", err
    )


BAD = {
    "more memory than any machine has": (
        {"lm_harness": {"include_path": "tasks", "batch_tokens": 10**13}},
        r"study.yaml: this machine cannot run it: the resident model and a batch need \d+",
    ),
    "unknown key": (
        {"objektive": "mean"},
        r"study.yaml:\d+: objektive: unknown key; did you mean",
    ),
    "unknown method": ({"space": {"method": "tis"}}, "no merge method named 'tis'; did you mean"),
    "unknown sampler": (
        {"search": {"sampler": "cmaes", "n_trials": 1}},
        "no sampler named 'cmaes'; did you mean 'cma_es'",
    ),
    "range": (
        {"space": {"method": "ties", "density": {"low": 0.1, "high": 1.5}}},
        r"range \[0.1, 1.5\] of 'density' is not within",
    ),
    "hyper-parameter": (
        {"space": {"method": "linear", "density": 0.5}},
        "method 'linear' has no hyper-parameter 'density'",
    ),
    "warm start": (
        {"search": {"n_trials": 9, "warm_start": "tasks"}},
        "search.warm_start: .*tasks: no study here",
    ),
    "missing path": ({"base": "nowhere"}, "nowhere: no such directory"),
    "missing split": (
        {"tasks": {"first": {"task": "tiny_first", "split": "test"}}},
        r"study.yaml:\d+: tasks.first.split: .*test.*validation",
    ),
    "unknown task": (
        {"tasks": {"first": {"task": "tiny_frist", "split": "validation"}}},
        r"study.yaml:\d+: tasks.first.task: .*tiny_frist.*did you mean.*tiny_first",
    ),
    "empty select": (
        {"tasks": {"first": {"task": "tiny_first", "split": "validation", "hold_out": 48}}},
        r"study.yaml:\d+: tasks.first: hold_out 48 were asked for",
    ),
    "unknown expert": (
        {"tasks": {"first": {"split": "validation", "expert": "third"}}},
        r"study.yaml:\d+: tasks.first.expert is 'third'; experts are: first, second",
    ),
}


@pytest.fixture
def refusal(searchmerge):
    """Call the command line, and return its one line of error."""

    def refusal(*words):
        code, _, err = searchmerge(*words)
        assert code == 2
        [line] = err.strip().splitlines()
        return line

    return refusal


@pytest.mark.parametrize("name", BAD)
def test_a_bad_study_ends_with_one_line_and_exit_code_2(study, refusal, name):
    changes, message = BAD[name]
    assert re.search(message, refusal("check", study(**changes)))


def test_experts_that_do_not_fit_are_refused(study, refusal, models, tmp_path):
    file = study()
    broken = tmp_path / "broken"
    shutil.copytree(models / "first", broken)
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    file.write_text(file.read_text().replace("first: first", "first: broken"))

    def with_tensor(tensor):
        save_file({**tensors, name: tensor}, broken / "model.safetensors")
        return refusal("check", file)

    error = with_tensor(tensors[name][:, :8].contiguous())
    assert name in error
    assert "[24, 8]" in error
    error = with_tensor(tensors[name] * float("nan"))
    assert name in error
    assert "NaN" in error
    save_file(tensors, broken / "model.safetensors")
    save_tokenizer(broken, words=[*WORDS[:-1], "other"])
    assert "tokenizer" in refusal("check", file)


@pytest.mark.slow
def test_a_study_of_three_methods_is_killed_resumed_and_reported(
    study, searchmerge, killed, tmp_path
):
    mixed = {
        "name": "mixed",
        "space": [
            {"method": "ties", "coefficient": {"low": 0.0, "high": 2.0},
             "density": {"low": 0.1, "high": 0.9}},
            {"method": "pcb", "coefficient": {"scale": {"low": 0.2, "high": 1.5}}},
            {"method": "dare", "density": {"low": 0.3, "high": 1.0, "per": "expert"},
             "settings": {"election": ["none", "ties"], "seed": 7}},
        ],
        "search": {"sampler": "auto", "n_trials": 14, "round_blocks": 2},
    }  # fmt: skip
    file = study(**mixed)
    run_dir = tmp_path / "runs" / "mixed"
    killed(file, run_dir, 70)
    code, _, err = searchmerge("run", file)
    assert code == 0, err
    assert [number for number, _ in trials(run_dir)] == list(range(14))
    stored = optuna.load_study(study_name=None, storage=f"sqlite:///{run_dir / 'study.db'}").trials
    methods = {t.params["method"] for t in stored}
    assert methods == {"ties", "pcb", "dare"}
    for trial in stored:
        own = f"{trial.params['method']}."
        assert all(key == "method" or key.startswith(own) for key in trial.params)
    assert (run_dir / "report.md").exists()
    # a second study begins with the first one's best plans
    search = mixed["search"] | {"warm_start": "runs/mixed", "warm_start_plans": 2, "n_trials": 6}
    warm = study(**{**mixed, "name": "warm", "search": search})
    code, _, err = searchmerge("run", warm)
    assert code == 0, err
    warmed = optuna.load_study(
        study_name=None, storage=f"sqlite:///{tmp_path / 'runs' / 'warm' / 'study.db'}"
    ).trials
    assert sum(t.user_attrs.get("kind") == "warm start" for t in warmed) == 2


def traces(page):
    """Return what a page of plotly draws."""
    call = page.read_text().rpartition("Plotly.newPlot(")[2]
    return json.JSONDecoder().raw_decode(call[call.index("[") :])[0]


def test_a_study_of_two_objectives_draws_its_front(study, searchmerge, tmp_path):
    tasks = {
        name: {"task": f"tiny_{name}", "split": "validation", "select": 24, "hold_out": 24,
               "expert": name}
        for name in EXPERTS
    }  # fmt: skip
    file = study(
        name="front",
        objective="tasks",
        tasks=tasks,
        constraints=[{"tasks": "all", "against": "base", "at_least": 0.1}],
        confirm={"top_k": 2, "n_resamples": 100, "pick": "worst"},
    )
    code, _, err = searchmerge("run", file)
    assert code == 0, err
    run_dir = tmp_path / "runs" / "front"
    results = json.loads((run_dir / "results.json").read_text())
    front = [point for point in results["points"] if point["kind"] == "front"]
    assert front
    drawn = {trace["name"]: trace for trace in traces(run_dir / "front.html")}
    front.sort(key=lambda point: point["values"]["first"])
    assert drawn["front"]["text"] == [point["name"] for point in front]
    for axis, task in zip("xy", EXPERTS, strict=True):
        assert drawn["front"][axis] == [point["values"][task] for point in front]
    assert drawn[f"saved: {results['winner']}"]["text"] == [results["winner"]]
    report = (run_dir / "report.md").read_text()
    for point in front:
        assert f"| {point['name']} |" in report
    assert "first at least 0.1 of the base's" in report


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"depth": 9}, "depth is 9; the model has 2 layers: 1 to 2"),
        ({"patterns": ["mlp", "down_proj", "rest"]}, "'mlp' and 'down_proj' both match"),
        ({"patterns": ["mlp", "attn"]}, "add 'rest' as the last one"),
        ({"patterns": ["conv", "rest"]}, "pattern 'conv' matches no parameter"),
    ],
)
def test_groups_that_do_not_divide_the_model_are_refused_before_anything_is_scored(
    study, searchmerge, tmp_path, groups, message
):
    file = study(name="divided", space={"method": "ties", "groups": groups, "density": SOME})
    code, _, err = searchmerge("run", file)
    assert code == 2
    assert message in err
    assert n_scored(tmp_path / "runs" / "divided") == 0


def test_names_in_a_table_are_shown_as_they_are(searchmerge, tmp_path):
    names = ("[/x]", "[bold]b[/bold]", ":smile:", "c\x1b[2Jd")
    scores = dict.fromkeys(names, 0.5)
    plan = MergePlan("ties", names, {"coefficient": ((0.5,) * len(names),)})
    Results(
        study="names",
        tasks=dict.fromkeys(names, "acc"),
        objective="mean",
        rows=[Row(f"expert {name}", scores, scores, (0.5, 0.4, 0.6), False) for name in names],
        winner=f"expert {names[0]}",
        verdict=f"The best is {names[0]}.",
        plan=plan.to_dict(),
        counts={},
        level=0.95,
        made_of={},
    ).save(tmp_path)
    code, out, err = searchmerge("report", tmp_path)
    assert (code, err) == (0, "")
    assert "The best is [/x]." in out
    for name in ("[/x]", "[bold]b[/bold]", ":smile:", "c\\x1b[2Jd"):
        assert out.count(name) >= 2
    assert "\x1b" not in out


@pytest.mark.parametrize(("columns", "n_tables"), [(80, 2), (120, 1)])
def test_a_table_wider_than_the_terminal_is_shown_in_parts(tmp_path, columns, n_tables):
    tasks = ("hypernym", "rhyme", "spelling")
    scores = dict.fromkeys(tasks, 0.5)
    leads = {"task arithmetic": (0.021, -0.005, 0.047), "trial 19": ()}
    Results(
        study="wide",
        tasks=dict.fromkeys(tasks, "acc"),
        objective="normalised",
        rows=[
            Row(n, scores, scores, (0.982, 0.956, 1.01), False, its) for n, its in leads.items()
        ],
        winner="trial 19",
        verdict="Saved is trial 19.",
        plan=MergePlan("ties", tasks, {"coefficient": ((0.5,) * 3,)}).to_dict(),
        counts={},
        level=0.95,
        made_of={},
    ).save(tmp_path)
    terminal = {**os.environ, "COLUMNS": str(columns), "FORCE_COLOR": "1", "TERM": "xterm"}
    shown = subprocess.run(
        [*RUN, "report", tmp_path], env=terminal, stdout=subprocess.PIPE, text=True, check=True
    )
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown.stdout).splitlines()
    rows = {name: [line for line in lines if line.startswith(f"│ {name} ")] for name in leads}
    assert [len(its) for its in rows.values()] == [n_tables, n_tables]
    assert sum(line.startswith("│") for line in lines) == 2 * n_tables  # no cell is broken
    assert all(len(line) <= columns for line in lines if line.startswith("│"))
    assert rows["task arithmetic"][-1].endswith("│ +2.1 [-0.5, +4.7] │")
    assert rows["trial 19"][-1].split("│")[-2].strip() == ""
    assert any("single comparisons" in line for line in lines)


def test_a_function_that_leaves_does_not_end_a_run_as_if_all_were_well(
    study, searchmerge, tmp_path
):
    (tmp_path / "leaves.py").write_text("import sys\ndef score(*_): sys.exit(0)\n")
    task = {"evaluator": "function", "function": "leaves:score", "n_examples": 40}
    code, _, err = searchmerge("run", study(name="leaves", tasks={"own": task}))
    assert code == 2
    assert "leaves:score called sys.exit(0)" in err


def test_a_run_that_is_stopped_before_a_merge_is_scored_has_nothing_to_save(
    study, searchmerge, tmp_path
):
    (tmp_path / "stops.py").write_text(
        "import signal\n"
        "def score(model, task, examples):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    return [0.5] * len(examples)\n"
    )
    task = {"evaluator": "function", "function": "stops:score", "n_examples": 40}
    code, _, err = searchmerge("run", study(name="stops", tasks={"own": task}))
    assert code == 128 + signal.SIGINT
    assert "goes on from here; no merge has been scored yet, so that there is nothing to" in err
    assert "searchmerge finish" not in err
    code, _, err = searchmerge("finish", tmp_path / "runs" / "stops")
    assert code == 2
    assert "before a merge was scored (nothing is), so that there is nothing to save" in err


def test_a_run_that_is_stopped_says_that_the_model_of_its_report_is_not_saved(
    study, searchmerge, tmp_path
):
    (tmp_path / "halts.py").write_text(
        "import pathlib, signal\n"
        "def score(model, task, examples):\n"
        "    if pathlib.Path(__file__).with_name('halt').exists():\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    return [float(model.get_parameter('model.norm.weight').mean())] * len(examples)\n"
    )
    task = {"evaluator": "function", "function": "halts:score", "n_examples": 40}
    file, model = study(name="halts", tasks={"own": task}), tmp_path / "runs" / "halts" / "model"
    assert searchmerge("run", file)[0] == 0
    (tmp_path / "halt").touch()
    told = f"The model that it calls saved is not in {Path('runs', 'halts', 'model')} yet."
    code, _, err = searchmerge("run", file, "--set", "search.n_trials=9")
    assert code == 128 + signal.SIGINT
    assert "Report of the last time that it was confirmed" in err and told not in err
    shutil.rmtree(model)
    code, _, err = searchmerge("run", file, "--set", "search.n_trials=9")
    assert told in err


def test_trials_that_failed_are_told_and_tried_again_once_that_is_asked_for(
    study, searchmerge, tmp_path
):
    n_references = len(reference_plans(EXPERTS))
    (tmp_path / "reads.py").write_text(
        "import pathlib\n"
        "SEEN = []\n"
        "def score(model, task, examples):\n"
        "    mean = float(model.get_parameter('model.norm.weight').double().mean())\n"
        "    if mean not in SEEN:\n"
        "        SEEN.append(mean)\n"
        f"    if SEEN.index(mean) >= {n_references} and SEEN.index(mean) % 2:\n"
        "        pathlib.Path(__file__).with_name('shared').read_text()\n"
        "    return [mean + 0.001 * (e % 7) for e in examples]\n"
    )
    task = {"evaluator": "function", "function": "reads:score", "n_examples": 40}
    search = {"sampler": "random", "n_trials": 9, "racing": "off"}
    file = study(name="reads", tasks={"own": task}, search=search)
    run_dir = tmp_path / "runs" / "reads"
    code, out, err = searchmerge("run", file)
    assert code == 0, err
    n_failed = [state for _, state in trials(run_dir)].count("FAIL")
    assert n_failed > 1
    told = f"{n_failed} of 9 trials failed, as: "
    for text in (out, searchmerge("status", run_dir)[1], searchmerge("report", run_dir)[1]):
        assert re.search(
            rf"^{told}.*No such file.* with --retry-failed tries them again", text, re.M
        )
    assert told in (run_dir / "report.md").read_text()
    (tmp_path / "shared").touch()
    code, out, err = searchmerge("run", file)
    assert (code, len(trials(run_dir))) == (0, 9), err
    assert told in out
    code, out, err = searchmerge("run", file, "--retry-failed")
    assert code == 0, err
    assert f"{n_failed} failed trials to be tried again" in err
    assert "trials failed, as" not in out
    states = [state for _, state in trials(run_dir)]
    assert states.count("COMPLETE") == 9
    assert len(states) == 9 + n_failed
    counts = Results.load(run_dir).counts
    assert counts["trials in full"] == 9
    assert counts["trials tried again after they failed"] == n_failed


def test_an_expert_that_is_given_twice_is_refused(searchmerge, tmp_path):
    (tmp_path / "plan.yaml").write_text(
        "method: linear\nexperts: [a]\nvalues: {coefficient: [[1.0]]}\n"
    )
    given = ["--base", "base", "--expert", "a=one", "--expert", "a=two", "--out", "out"]
    code, _, err = searchmerge("merge", tmp_path / "plan.yaml", *given)
    assert code == 2
    assert "--expert a is given twice" in err


def test_scores_of_other_models_are_not_taken_where_the_study_itself_was_lost(
    study, searchmerge, tmp_path
):
    file = study(search={"sampler": "random", "n_trials": 2})
    run_dir = tmp_path / "runs" / tmp_path.name
    assert searchmerge("run", file)[0] == 0
    for stored in run_dir.glob("study.db*"):
        stored.unlink()
    changed = tmp_path / EXPERTS[0]
    changed.unlink()
    shutil.copytree(tmp_path / EXPERTS[1], changed)
    code, _, err = searchmerge("run", file)
    assert code == 2
    assert "scores.db: holds scores of another study" in err

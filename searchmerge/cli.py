"""The command line: arguments in, lines out."""

import contextlib
import io
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from searchmerge.errors import SearchMergeError, SpecError, StudyError, printable
from searchmerge.machine import use_allowed_cores, wait_asleep

if TYPE_CHECKING:
    from searchmerge.config import RunConfig
    from searchmerge.report.results import Results
    from searchmerge.study import Study as StudyValue

app = typer.Typer(
    help="Find the best merge of several fine-tuned experts of one base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = Console(markup=False, emoji=False, highlight=False)  # names are shown, not obeyed
_err = Console(stderr=True, markup=False, emoji=False, highlight=False)
_WIDTH_OF_A_FILE = 160
_SIGNALLED = 128  # plus the signal's number, as a shell says it

Study = Annotated[Path, typer.Argument(help="A study file, or the folder of a study.yaml.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A run config: what machine.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. search.n_trials=20."),
]
RunDir = Annotated[Path, typer.Argument(help="A run directory, e.g. runs/quickstart.")]
RunsDir = Annotated[Path | None, typer.Option(help="Where run directories are; default runs/.")]


class _State:
    debug = False


@app.callback()
def _main(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and logs.")] = False,
) -> None:
    _State.debug = debug
    level = logging.INFO if debug else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "lm_eval", "datasets", "transformers"):
        logging.getLogger(noisy).setLevel(logging.INFO if debug else logging.ERROR)
    for switch in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(switch, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    wait_asleep()
    use_allowed_cores()


@app.command()
def run(
    study: Study,
    config: ConfigFile = None,
    runs_dir: RunsDir = None,
    set_: Overrides = None,
    *,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try trials again that failed in earlier runs.")
    ] = False,
) -> None:
    """Run a study, or go on with it where it was stopped."""
    from searchmerge.config import read_config
    from searchmerge.study import read_study

    settings = read_config(config)
    asked = read_study(study, _read_overrides(set_))
    run_dir = (runs_dir or Path(settings.runs_dir)) / asked.name
    _run(asked, settings, run_dir, search=True, retry_failed=retry_failed)


@app.command()
def finish(run_dir: RunDir, config: ConfigFile = None) -> None:
    """Search no more: confirm and save the best plan that a stopped run has found."""
    from searchmerge.config import read_config
    from searchmerge.study import kept_study

    _run(kept_study(run_dir), read_config(config), run_dir, search=False, retry_failed=False)


def _run(
    study: "StudyValue", config: "RunConfig", run_dir: Path, *, search: bool, retry_failed: bool
) -> None:
    from searchmerge.interrupts import Stopped, stopped_by_signals
    from searchmerge.progress import ProgressView
    from searchmerge.run import run_study

    try:
        with stopped_by_signals(), ProgressView(_err, crowding=config.crowding) as view:
            results = run_study(
                study, config, run_dir, view, search=search, retry_failed=retry_failed
            )
    except Stopped as stopped:
        _print_stopped(run_dir, config.storage)
        raise typer.Exit(_SIGNALLED + stopped.number) from None
    _print_results(results)
    _out.print(f"Report, plans and model are in {run_dir}.", soft_wrap=True)


@app.command()
def check(study: Study, config: ConfigFile = None, set_: Overrides = None) -> None:
    """Check a study without running it, and say what a trial will cost."""
    from searchmerge.check import check_study
    from searchmerge.config import read_config
    from searchmerge.study import read_study

    for line in check_study(read_study(study, _read_overrides(set_)), read_config(config)):
        _out.print(line, soft_wrap=True)


@app.command()
def status(
    run_dir: RunDir,
    config: ConfigFile = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how far a study is; it may be running, stopped or done."""
    from searchmerge.config import read_config
    from searchmerge.search.status import read_status

    storage = read_config(config).storage
    if as_json:
        _out.print_json(json.dumps(read_status(run_dir, storage)))
        return
    _print_status(run_dir, storage)


@app.command()
def report(
    run_dir: RunDir,
) -> None:
    """Write the report of a finished study again, and print its table."""
    from searchmerge.report.results import REPORT_FILE, Results

    results = Results.load(run_dir)
    results.save(run_dir)
    _print_results(results)
    _out.print(f"Written: {run_dir / REPORT_FILE}", soft_wrap=True)


@app.command()
def verify(
    run_dir: RunDir,
    config: ConfigFile = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Held-out examples of each task; default: all.")
    ] = None,
) -> None:
    """Score the saved model with lm-eval's own harness, and compare with the report."""
    from searchmerge.config import read_config
    from searchmerge.verify import Verification

    verification = Verification(run_dir, read_config(config))
    compared = list(verification.compare(limit))
    _print_table(
        ["task", "examples", "ours", "lm-eval", "difference", ""],
        [
            [c.task, f"{c.n_examples} {c.part}", f"{c.ours:.6f}", f"{c.theirs:.6f}",
             f"{c.difference:+.6f}", "differs" if c.beyond else "same"]
            for c in compared
        ],
    )  # fmt: skip
    for line in verification.told(compared):
        _out.print(line, soft_wrap=True)
    if any(c.is_wrong for c in compared):
        raise typer.Exit(1)


@app.command()
def answers(
    run_dir: RunDir,
    task: Annotated[str, typer.Option(help="A task whose answers are kept.")],
    plan: Annotated[str, typer.Option(help="best, or a name of the report's table.")] = "best",
    against: Annotated[list[str] | None, typer.Option(help="Another plan, or several.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many examples.")] = 10,
) -> None:
    """Show what plans said to a task's held-out examples, side by side."""
    from searchmerge.answers import kept_answers
    from searchmerge.report.answers import answers_table

    said = kept_answers(run_dir, task, [plan, *(against or ())])
    _print_table(*answers_table([(name, given[:limit]) for name, given in said]))


@app.command()
def merge(
    plan: Annotated[Path, typer.Argument(help="A merge plan.")],
    base: Annotated[str, typer.Option(help="The base model: a directory or a hub id.")],
    expert: Annotated[list[str], typer.Option(metavar="NAME=PATH", help="One per expert.")],
    out: Annotated[Path, typer.Option(help="The directory to write the model to.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="What a study would say, e.g. dtype=float32."
        ),
    ] = None,
) -> None:
    """Merge once, as a plan says, and write the model."""
    from searchmerge.classifier import head_files
    from searchmerge.heads import saved_heads
    from searchmerge.models import (
        check_groups,
        load_task_vectors,
        merged_here,
        open_models,
        save_merge,
        warn_of_doubts,
    )
    from searchmerge.plan import MergePlan
    from searchmerge.study import plain_study
    from searchmerge.watch import Watch

    what = MergePlan.from_yaml(plan)
    pairs = [_pair(text, "--expert") for text in expert]
    experts = dict(pairs)
    if len(experts) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise SpecError(f"--expert {twice} is given twice")
    if missing := [name for name in what.experts if name not in experts]:
        raise SpecError(f"{plan}: merges expert {missing[0]!r}; give --expert {missing[0]}=PATH")
    named = {name: experts[name] for name in what.experts}
    study = plain_study(base, named, _read_overrides(set_))
    models = open_models(study, resident=False)
    check_groups(study, models)
    warn_of_doubts(models)
    watch = Watch(models)
    vectors = load_task_vectors(study, models)
    heads = head_files(saved_heads(study, models), models.dtype)
    weights = merged_here(models, vectors, what)
    save_merge(models, weights, what, out, files=heads, check=watch.check)
    _out.print(f"Written: {out}", soft_wrap=True)


def main() -> None:
    """Run the command line; a wrong input ends it with one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that its encoding does not have
    with _one_line_errors():
        app()


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except SearchMergeError as error:
        if _State.debug:
            raise
        _err.print(f"error: {error}", style="red", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _err.print("Interrupted.")
        sys.exit(_SIGNALLED + signal.SIGINT)


def _read_overrides(texts: list[str] | None) -> dict[str, str]:
    return dict(_pair(text, "--set") for text in texts or [])


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise SpecError(f"{option} {text!r} is not of the form name=value")
    return key, value


def _print_results(results: "Results") -> None:
    """Print the table, in parts where it is wider than the terminal, and what it says."""
    for header, cells in _in_parts(*results.table(), _width()):
        _print_table(header, cells, bold=results.winner)
    _out.print(results.legend, soft_wrap=True)
    _out.print(results.verdict, soft_wrap=True)
    for more in filter(None, (results.ended, results.failed, results.unsaved)):
        _out.print(more, soft_wrap=True)


def _in_parts(
    header: list[str], cells: list[list[str]], width: int
) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield a table as tables that fit the width, each with the first column."""
    lines = [header, *cells]
    widths = [3 + max(cell_len(printable(line[c])) for line in lines) for c in range(len(header))]
    shown = [0]
    for column in range(1, len(header)):
        if len(shown) > 1 and 1 + sum(widths[c] for c in [*shown, column]) > width:
            yield [header[c] for c in shown], [[row[c] for c in shown] for row in cells]
            shown = [0]
        shown.append(column)
    yield [header[c] for c in shown], [[row[c] for c in shown] for row in cells]


def _width() -> int:
    """Return how wide tables may be."""
    return _out.width if _out.is_terminal else _WIDTH_OF_A_FILE


def _print_table(header: list[str], cells: list[list[str]], bold: str = "") -> None:
    table = Table(*map(printable, header))
    for row in cells:
        table.add_row(*map(printable, row), style="bold" if row[0] == bold else None)
    Console(width=_width(), markup=False, emoji=False, highlight=False).print(table)


def _print_stopped(run_dir: Path, storage: str | None) -> None:
    from searchmerge.report.results import Results
    from searchmerge.saving import MODEL_DIR, is_saved
    from searchmerge.search.directory import BEST_SO_FAR, plan_file

    _err.print(f"Stopped. All scores are kept in {run_dir}.", soft_wrap=True)
    with contextlib.suppress(StudyError):  # it may have been stopped before it was begun
        _print_status(run_dir, storage)
    if (report := run_dir / "report.md").exists():
        is_confirmed = (run_dir / "results.json").exists()
        what = "Report of the last time that it was confirmed" if is_confirmed else "Report so far"
        _err.print(f"{what}: {report}", soft_wrap=True)
        if is_confirmed and not is_saved(run_dir / MODEL_DIR, Results.load(run_dir).merge_plan):
            told = f"The model that it calls saved is not in {run_dir / MODEL_DIR} yet."
            _err.print(told, soft_wrap=True)
    if not plan_file(run_dir, BEST_SO_FAR).exists():
        _err.print(
            "The same command goes on from here; no merge has been scored yet, so that there is "
            "nothing to save.",
            soft_wrap=True,
        )
        return
    _err.print(
        f"The same command goes on from here; searchmerge finish {shlex.quote(str(run_dir))} "
        "confirms and saves the best plan that there is.",
        soft_wrap=True,
    )


def _print_status(run_dir: Path, storage: str | None) -> None:
    from searchmerge.search.status import describe_status

    for line in describe_status(run_dir, storage):
        _out.print(line, soft_wrap=True)

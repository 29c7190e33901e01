"""What a run leaves: its report, and the winner's model with its card."""

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from searchmerge.checkpoints.writer import PLAN_FILE
from searchmerge.classifier import SavedHead, head_files
from searchmerge.durable import write_atomically
from searchmerge.errors import SpecError, StudyError, WorkerError
from searchmerge.execution.executor import Executor
from searchmerge.heads import saved_heads
from searchmerge.models import Models, load_task_vectors, merged_here, save_merge
from searchmerge.plan import MergePlan
from searchmerge.report.card import model_card
from searchmerge.report.front import save_front
from searchmerge.report.results import Results
from searchmerge.search.observer import Observer
from searchmerge.search.references import BASE
from searchmerge.spec import merge_overrides
from searchmerge.study import Study
from searchmerge.watch import Watch
from searchmerge.yaml_text import yaml_in_one_line

MODEL_DIR = "model"
CARD_FILE = "README.md"

_logger = logging.getLogger(__name__)


def save_results(
    results: Results,
    study: Study,
    watch: Watch,
    run_dir: Path,
    observer: Observer,
    executor: Executor,
) -> None:
    """Write the report, and the winner's model unless it is there already.

    A worker merges it where one can, on its device and with what its methods have measured.
    Until it is there the report says that it is not.

    Raises:
        SearchMergeError: If something cannot be written, or the model cannot be merged.
    """
    out, plan = run_dir / MODEL_DIR, results.merge_plan
    models = watch.models
    heads = saved_heads(study, models)
    card = _card(results, study, models, out, heads)
    if is_saved(out, plan, heads):
        _renew_card(out, card)
    else:
        replace(results, is_saved=False).save(run_dir)
        observer.phase("saving the model", None)
        files = {**head_files(heads, models.dtype), CARD_FILE: card}
        write = functools.partial(
            save_merge, models, plan=plan, out=out, files=files, check=watch.check
        )
        try:
            executor.write_merged(plan, models.dtype, write)
        except WorkerError as error:
            _logger.warning("the model is merged in this process, as %s", error)
            write(merged_here(models, load_task_vectors(study, models), plan))
    results.save(run_dir)
    if results.points:
        save_front(results.points, results.winner, results.front_title, run_dir, results.raw)


def _renew_card(out: Path, card: str) -> None:
    """Write the card of a model that is there already."""
    try:
        write_atomically(out / CARD_FILE, card)
    except OSError as error:
        raise StudyError(f"{out}: cannot be written: {error.strerror}") from error


def _card(
    results: Results, study: Study, models: Models, out: Path, heads: Mapping[str, SavedHead]
) -> str:
    """Return the card of the model in ``out``, whose paths are from there on."""
    classes = {expert: head.labels for expert, head in heads.items() if head.model_class}
    experts = {name: _seen_from(out, source) for name, source in models.sources.items()}
    overrides = merge_overrides(study.spec)
    template = study.spec.chat_template
    if template is not None and template not in (BASE, *experts):
        overrides["chat_template"] = yaml_in_one_line(_seen_from(out, study.resolve(template)))
    return model_card(results, _seen_from(out, models.base.name), experts, classes, overrides)


def _seen_from(folder: Path, source: str) -> str:
    """Return how a file or directory is named from ``folder`` on; a hub id as it is."""
    path = Path(source).expanduser()
    return os.path.relpath(path.resolve(), folder.resolve()) if path.exists() else source


def is_saved(out: Path, plan: MergePlan, heads: Mapping[str, SavedHead] | None = None) -> bool:
    """Return whether a plan's model is in ``out``, with these heads."""
    if not all((out / file).is_file() for file in head_files(heads or {})):
        return False
    try:
        return MergePlan.from_yaml(out / PLAN_FILE) == plan
    except SpecError:
        return False

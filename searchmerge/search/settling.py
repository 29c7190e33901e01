"""After the search: what was stopped early and may still win goes on, until nothing may."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from searchmerge.plan import MergePlan
from searchmerge.search.candidates import best_candidates, candidates
from searchmerge.search.directory import StudyDirectory
from searchmerge.search.dispatch import Job, ListSource
from searchmerge.search.evidence import Evidence
from searchmerge.search.incumbents import Incumbents
from searchmerge.search.objective import Objective
from searchmerge.search.observer import Observer
from searchmerge.search.pick import Plans, contenders, evidence_on_select
from searchmerge.search.racing import Racing
from searchmerge.search.references import merges
from searchmerge.search.runner import StudyRunner
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.trials import TrialRecord
from searchmerge.wording import counted

_logger = logging.getLogger(__name__)


class Settled(NamedTuple):
    """The trials of a study when no other may win.

    Attributes:
        read: By digest of the plan, as they are read or predicted by all that is known.
        typical: Those that were stopped early and did not collapse: they tell what plans usually
            score.
    """

    read: Mapping[str, TrialRecord]
    typical: Sequence[TrialRecord]


class Settling:
    """Settles which plans are the best, so that none of them is by a prediction.

    Args:
        directory: Keeps what is completed.
        runner: Scores plans. In the end its board reads grades as all plans tell to read them.
        observer: Shows a person what happens.
        objective: With the experts' scores put in.
        racing: Stops again what goes on; ``None`` scores it in full.
        seed: Of how grades are read; ``None`` goes by the metric alone.
    """

    def __init__(
        self,
        directory: StudyDirectory,
        runner: StudyRunner,
        observer: Observer,
        objective: Objective,
        racing: Racing | None,
        seed: int | None,
    ) -> None:
        self._directory = directory
        self._runner = runner
        self._observer = observer
        self._objective = objective
        self._racing = racing
        self._seed = seed
        self._failed: set[str] = set()  # digests of plans that cannot be scored

    def complete_the_best(
        self, references: Plans, n_best: int, *, goes_on: bool
    ) -> tuple[dict[str, MergePlan], Evidence]:
        """Settle the study, and score those of the best in full that were stopped early.

        Args:
            references: Name to plan of those that were scored.
            n_best: How many candidates to return, at most.
            goes_on: Whether those go on too that may win by what was learnt since.

        Returns:
            The best candidates, best first, their plans written down; and what is believed of
            all plans by what was scored on the examples that select.
        """
        settled, scored = self._completed(n_best, goes_on=goes_on)
        full = [record for record in scored if record.is_full]
        evidence = self._evidence(references, full, settled.typical)
        believed = dict(zip(evidence.names, evidence.values.tolist(), strict=True))
        full = [replace(r, value=believed[r.name]) for r in full if r.name in believed]
        best = {record.name: record.plan for record in self._best_of(full, n_best)}
        for name, plan in best.items():
            self._directory.write_plan(name, plan)
        return best, evidence

    def settle(self, *, goes_on: bool = True) -> Settled:
        """Read all trials anew, and go on with those that may win by what was learnt since.

        Until none may: a study that is settled has nothing to score where it is settled again,
        but for what could not be scored.

        Args:
            goes_on: Whether anything is scored.
        """
        while True:
            incumbents = self._runner.incumbents_so_far(self._objective, self._racing, self._seed)
            incumbents.read_anew()
            predicted = incumbents.predict_anew()
            stopped = [r for r in predicted if r.plan.digest not in self._failed]
            may_win = [r for r in stopped if goes_on and incumbents.may_win(r.plan)]
            if not may_win:
                known = {r.plan.digest: r for r in (*stopped, *incumbents.read)}
                return Settled(known, incumbents.stopped)
            self._go_on(may_win, incumbents)

    def _go_on(self, stopped: Sequence[TrialRecord], incumbents: Incumbents) -> None:
        """Go on with trials that were stopped early, best first, until each is stopped again."""
        rounds = incumbents.rounds()
        source = _StoppedSource(
            [Job(record.name, record.plan, rounds, record) for record in stopped],
            incumbents,
            self._objective,
            self._directory,
            self._observer,
        )
        self._runner.score_jobs("going on with what may win", source)
        self._failed |= {r.plan.digest for r in stopped if r.name in source.failures}

    def _completed(self, n_best: int, *, goes_on: bool) -> tuple[Settled, list[TrialRecord]]:
        """Settle and score the best in full, in turns; return what is settled, and candidates."""
        n_failed = 0
        while True:
            settled = self.settle(goes_on=goes_on)
            scored = [
                record
                for record in self._candidates(settled)
                if record.is_full or record.plan.digest not in self._failed
            ]
            best = self._best_of(scored, n_best)
            missing = {record.name: record for record in best if not record.is_full}
            if not missing:
                return settled, scored
            if n_failed >= n_best:
                _logger.warning(
                    "%s among the best cannot be scored in full; no more are tried in their stead",
                    counted(n_failed, "plan"),
                )
                return settled, [record for record in scored if record.is_full]
            plans = {name: record.plan for name, record in missing.items()}
            names = self._runner.score_plans("completing the best", plans, "select")
            failed = {plans[name].digest for name in missing if name not in names}
            n_failed += len(failed)
            self._failed |= failed
            for name in (name for name in missing if name in names):
                scores = self._runner.board.scores(plans[name], "select")
                self._directory.keep_completed(missing[name].judged(self._objective, scores))

    def _candidates(self, settled: Settled) -> list[TrialRecord]:
        """Return the candidates as they are read, or predicted, in the end."""
        return [
            replace(record.read_as(its.completed_scores()), se=its.se)
            if (its := settled.read.get(record.plan.digest)) and not record.refines
            else record
            for record in candidates(self._directory.records(), self._objective)
        ]

    def _best_of(self, scored: Sequence[TrialRecord], n_best: int) -> list[TrialRecord]:
        """Return the best candidates, best first, also apart from all references."""
        references, observed = self._runner.references.values(), self._runner.board.observed
        return best_candidates(scored, n_best, references, observed)

    def _evidence(
        self, references: Plans, full: Sequence[TrialRecord], typical: Sequence[TrialRecord]
    ) -> Evidence:
        """Return what is believed of references and of candidates that were scored in full."""
        done = {record.plan.digest for record in full}
        still = [record for record in typical if record.plan.digest not in done]
        plans = contenders(references, full)
        board = self._learnt_board([*merges(plans), *(record.plan for record in still)])
        evidence = evidence_on_select(board, plans, self._objective, still)
        return evidence.flattered([record.name for record in full if record.refines])

    def _learnt_board(self, plans: Iterable[MergePlan]) -> Scoreboard:
        """Return the scoreboard, from here on with grades read as plans tell to read them."""
        if self._seed is not None:
            learnt = self._runner.board.learn(plans, self._seed)
            self._runner.board = self._runner.board.read_by(learnt)
        return self._runner.board


class _StoppedSource(ListSource[TrialRecord]):
    """Trials that were stopped early, gone on with while they may win."""

    def __init__(
        self,
        jobs: Sequence[Job[TrialRecord]],
        incumbents: Incumbents,
        objective: Objective,
        directory: StudyDirectory,
        observer: Observer,
    ) -> None:
        super().__init__(jobs)
        self._incumbents = incumbents
        self._objective = objective
        self._directory = directory
        self._observer = observer

    def goes_on(self, job: Job[TrialRecord]) -> bool:
        return self._incumbents.may_win(job.plan)

    def finished(self, job: Job[TrialRecord]) -> None:
        super().finished(job)
        outcome = self._incumbents.outcome(job.plan)
        is_full = outcome.stopped_after is None
        record = job.subject.judged(self._objective, outcome.scores, outcome.estimates)
        record = replace(record, stopped_after=outcome.stopped_after, is_completed=is_full)
        self._directory.scores.flush()
        is_best = False
        if is_full:
            self._directory.keep_completed(record)
            is_best = self._incumbents.enter(record)
        self._observer.trial(record, is_best=is_best)

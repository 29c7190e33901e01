"""The study runner: references first, then what the sampler proposes, until the budget ends."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from searchmerge.errors import StudyError
from searchmerge.execution.blocks import Part
from searchmerge.interrupts import held_back
from searchmerge.plan import MergePlan
from searchmerge.search.budget import Budget, Spending, StudyClock
from searchmerge.search.directory import StudyDirectory
from searchmerge.search.dispatch import Dispatcher, Job, ListSource
from searchmerge.search.incumbents import Incumbents
from searchmerge.search.objective import Objective
from searchmerge.search.observer import Observer
from searchmerge.search.racing import Racing
from searchmerge.search.references import BASE, is_merge
from searchmerge.search.scoreboard import Scoreboard
from searchmerge.search.space import SearchSpace
from searchmerge.search.trial_source import TrialSource, enter_all
from searchmerge.search.trials import FINISHED, TrialRecord, is_refined


class StudyRunner:
    """Runs one study on one executor, from wherever it stands.

    Args:
        directory: The study and its scores.
        space: What to search.
        board: What plans score; :meth:`score_references` decides its order.
        dispatcher: Keeps the workers busy.
        references: Name to plan of what the winner is compared with.
        observer: Shows a person what happens.
    """

    def __init__(
        self,
        directory: StudyDirectory,
        space: SearchSpace,
        board: Scoreboard,
        dispatcher: Dispatcher,
        references: Mapping[str, MergePlan],
        observer: Observer,
    ) -> None:
        self.board = board
        self._directory = directory
        self._space = space
        self._dispatcher = dispatcher
        self._references = references
        self._observer = observer
        self.failures: dict[str, str] = {}
        """Plan name to why it could not be scored in this run."""

    def score_plans(self, title: str, plans: Mapping[str, MergePlan], part: Part) -> set[str]:
        """Score plans on all of ``part``; return the names of those that can be scored."""
        rounds = self.board.schedule.rounds[part]
        source = _PlansSource(
            [Job(name, plan, rounds, None) for name, plan in plans.items()],
            report=lambda job: self._observer.step(job.name, self.board.scores(job.plan, part)),
        )
        self._observer.phase(title, len(plans))
        self._dispatcher.run(source)
        self.failures |= source.failures
        return {job.name for job in source.done}

    def score_references(self, *, goes_on: bool = True) -> dict[str, MergePlan]:
        """Score the references and let them decide the order in which trials see examples.

        Args:
            goes_on: Whether the search goes on, or was ended. Where it was ended before its
                first trial, those merges are left out that no earlier run has scored.

        Returns:
            Name to plan of those that can be scored.

        Raises:
            StudyError: If the search was ended before a merge was scored.
        """
        wanted = self._references
        if not (goes_on or self._directory.is_begun):
            wanted = self._scored_before()
        names = self.score_plans("references", wanted, "pilot")
        scored = {name: plan for name, plan in self._references.items() if name in names}
        for name, plan in scored.items():
            self._directory.write_plan(name, plan)
        # a reference that failed in an earlier run may be scored now: the order stays what it was
        deciding = self._directory.keep_deciding([name for name in scored if name != BASE])
        self.board = self.board.informed(scored.values(), [scored[name] for name in deciding])
        return scored

    def _scored_before(self) -> dict[str, MergePlan]:
        """Return the references but the merges that were not scored, in full, by earlier runs."""
        scored = [n for n, plan in self._references.items() if self.board.is_full(plan, "pilot")]
        if not any(map(is_merge, scored)):
            raise StudyError(
                f"{self._directory.run_dir}: the search ended among the references before a merge "
                f"was scored ({', '.join(scored) or 'nothing'} is), so that there is nothing to "
                "save; the same `searchmerge run` goes on from there"
            )
        left_out = [n for n in self._references if is_merge(n) and n not in scored]
        self.failures |= dict.fromkeys(left_out, "not scored before the search ended")
        return {name: plan for name, plan in self._references.items() if name not in left_out}

    def run(
        self,
        objective: Objective,
        budget: Budget,
        racing: Racing | None,
        seed: int | None = None,
    ) -> None:
        """Run trials until the budget ends.

        Args:
            objective: With the experts' scores put in.
            budget: When to end.
            racing: Stops candidates that will not win; ``None`` scores all in full.
            seed: Of how grades are read; ``None`` goes by the metric alone.

        Raises:
            StudyError: If the first trials all fail.
        """
        for name, plan in self._references.items():
            if (params := self._space.params(plan)) is not None:
                self._directory.enqueue(name, [params])
        spending = self._begun(budget)
        self._observer.phase("search", budget.n_trials, spending.n_finished)
        self._run_trials(objective, self._incumbents(objective, racing, seed), spending)

    def spending(self, objective: Objective, budget: Budget, seed: int | None = None) -> Spending:
        """Return how much of a budget all runs so far have used.

        Args:
            objective: With the experts' scores put in.
            budget: When to end.
            seed: As for :meth:`run`.
        """
        spending = self._begun(budget)
        enter_all(self._directory, objective, self._incumbents(objective, None, seed), spending)
        return spending

    def _begun(self, budget: Budget) -> Spending:
        """Return what is spent of a budget, but for the trials that its patience counts."""
        finished = self._directory.trials(*FINISHED)
        n_finished = sum(not is_refined(trial) for trial in finished)
        return Spending(budget, StudyClock(self._directory.searching), n_finished)

    def run_refined(
        self, objective: Objective, racing: Racing | None, clock: StudyClock, seed: int | None
    ) -> None:
        """Run the refined trials that wait in the queue, whatever is left of the budget.

        Args:
            objective: With the experts' scores put in.
            racing: Stops those that collapse.
            clock: Counts the seconds.
            seed: As for :meth:`run`.
        """
        nothing_more = Spending(Budget(n_trials=0), clock)
        self._run_trials(objective, self._incumbents(objective, racing, seed), nothing_more)

    def settle(
        self,
        objective: Objective,
        racing: Racing | None,
        seed: int | None,
        *,
        goes_on: bool = True,
    ) -> "Settled":
        """Read all trials anew, and go on with those that may win by what was learnt since.

        Until none may: a study that is settled has nothing to score where it is settled again,
        but for what could not be scored.

        Args:
            objective: With the experts' scores put in.
            racing: Stops them again; ``None`` scores them in full.
            seed: As for :meth:`run`.
            goes_on: Whether anything is scored.
        """
        failed: set[str] = set()
        while True:
            incumbents = self._with_all_trials(objective, racing, seed)
            incumbents.read_anew()
            stopped = [r for r in incumbents.predict_anew() if r.plan.digest not in failed]
            may_win = [r for r in stopped if goes_on and incumbents.may_win(r.plan)]
            if not may_win:
                known = {r.plan.digest: r for r in (*stopped, *incumbents.read)}
                return Settled(known, incumbents.stopped)
            failed |= self._go_on(may_win, incumbents, objective)

    def _go_on(
        self, stopped: Sequence[TrialRecord], incumbents: Incumbents, objective: Objective
    ) -> set[str]:
        """Go on with trials that were stopped early, best first, until each is stopped again.

        Returns:
            The digests of those plans that cannot be scored.
        """
        rounds = incumbents.rounds()
        source = _StoppedSource(
            [Job(record.name, record.plan, rounds, record) for record in stopped],
            incumbents,
            objective,
            self._directory,
            self._observer,
        )
        self._observer.phase("going on with what may win", len(stopped))
        self._dispatcher.run(source)
        self.failures |= source.failures
        return {record.plan.digest for record in stopped if record.name in source.failures}

    def leader(self, objective: Objective, seed: int | None) -> tuple[str, MergePlan] | None:
        """Return the name and the plan with the best evidence; ``None`` before a merge is scored.

        Refined plans are not among them: of those held-out examples tell.

        Args:
            objective: With the experts' scores put in.
            seed: As for :meth:`run`.
        """
        return self._with_all_trials(objective, None, seed).leader

    def _with_all_trials(
        self, objective: Objective, racing: Racing | None, seed: int | None
    ) -> Incumbents:
        """Return what candidates are compared with after all trials so far."""
        incumbents = self._incumbents(objective, racing, seed)
        nothing_more = Spending(Budget(n_trials=0), StudyClock(self._directory.searching))
        enter_all(self._directory, objective, incumbents, nothing_more)
        return incumbents

    def _incumbents(
        self, objective: Objective, racing: Racing | None, seed: int | None
    ) -> Incumbents:
        return Incumbents(
            self.board,
            objective,
            racing,
            references=self._references,
            seed=seed,
        )

    def _run_trials(
        self, objective: Objective, incumbents: Incumbents, spending: Spending
    ) -> None:
        """Run the trials that were left behind or wait, and new ones until the budget ends."""
        source = TrialSource(
            self._directory, self._space, objective, incumbents, spending, self._observer
        )
        self._directory.begin_run()
        try:
            self._dispatcher.run(source)
        finally:
            with held_back():
                spending.clock.keep()
                self._directory.end_run()


class Settled(NamedTuple):
    """The trials of a study when no other may win.

    Attributes:
        read: By digest of the plan, as they are read or predicted by all that is known.
        typical: Those that were stopped early and did not collapse: they tell what plans usually
            score.
    """

    read: Mapping[str, TrialRecord]
    typical: Sequence[TrialRecord]


class _PlansSource(ListSource[None]):
    """A list of plans, whose progress is shown."""

    def __init__(self, jobs: Sequence[Job[None]], report: Callable[[Job[None]], None]) -> None:
        super().__init__(jobs)
        self._report = report

    def finished(self, job: Job[None]) -> None:
        super().finished(job)
        self._report(job)


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

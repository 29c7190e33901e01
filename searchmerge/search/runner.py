"""The study runner: references first, then what the sampler proposes, until the budget ends."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

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
from searchmerge.search.trials import is_refined, standing_trials

T = TypeVar("T")

TasksOf = Mapping[str, Collection[str]]
"""Plan name to tasks."""


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
        self.references = references
        self._observer = observer
        self.failures: dict[str, str] = {}
        """Plan name to why it could not be scored in this run."""

    def score_plans(
        self,
        title: str,
        plans: Mapping[str, MergePlan],
        part: Part,
        tasks: TasksOf | None = None,
    ) -> set[str]:
        """Score plans on ``part``; return the names of those that can be scored.

        Args:
            title: What is shown of it.
            plans: Name to plan.
            part: Which examples.
            tasks: Name to the tasks that it is scored on; ``None`` for all.
        """
        schedule = self.board.schedule
        tasks = tasks or dict.fromkeys(plans, tuple(schedule.tasks))

        def report(job: Job[None]) -> None:
            self._observer.step(job.name, self.board.scores(job.plan, part, tasks[job.name]))

        source = _PlansSource(
            [
                Job(name, plan, schedule.rounds_of(part, tasks[name]), None)
                for name, plan in plans.items()
            ],
            report,
        )
        self.score_jobs(title, source)
        return {job.name for job in source.done}

    def score_jobs(self, title: str, source: ListSource[T]) -> None:
        """Score the jobs of a list, and keep why some cannot be scored."""
        self._observer.phase(title, len(source.jobs))
        self._dispatcher.run(source)
        self.failures |= source.failures

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
        wanted = self.references
        if not (goes_on or self._directory.is_begun):
            wanted = self._scored_before()
        names = self.score_plans("references", wanted, "pilot")
        scored = {name: plan for name, plan in self.references.items() if name in names}
        for name, plan in scored.items():
            self._directory.write_plan(name, plan)
        # a reference that failed in an earlier run may be scored now: the order stays what it was
        deciding = self._directory.keep_deciding([name for name in scored if name != BASE])
        self.board = self.board.informed(scored.values(), [scored[name] for name in deciding])
        return scored

    def _scored_before(self) -> dict[str, MergePlan]:
        """Return the references but the merges that were not scored, in full, by earlier runs."""
        scored = [n for n, plan in self.references.items() if self.board.is_full(plan, "pilot")]
        if not any(map(is_merge, scored)):
            raise StudyError(
                f"{self._directory.run_dir}: the search ended among the references before a merge "
                f"was scored ({', '.join(scored) or 'nothing'} is), so that there is nothing to "
                "save; the same `searchmerge run` goes on from there"
            )
        left_out = [n for n in self.references if is_merge(n) and n not in scored]
        self.failures |= dict.fromkeys(left_out, "not scored before the search ended")
        return {name: plan for name, plan in self.references.items() if name not in left_out}

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
        for name, plan in self.references.items():
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
        finished = standing_trials(self._directory.study)
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

    def leader(self, objective: Objective, seed: int | None) -> tuple[str, MergePlan] | None:
        """Return the name and the plan with the best evidence; ``None`` before a merge is scored.

        Refined plans are not among them: of those held-out examples tell.

        Args:
            objective: With the experts' scores put in.
            seed: As for :meth:`run`.
        """
        return self.incumbents_so_far(objective, None, seed).leader

    def incumbents_so_far(
        self, objective: Objective, racing: Racing | None, seed: int | None
    ) -> Incumbents:
        """Return what candidates are compared with after all trials so far.

        Args:
            objective: With the experts' scores put in.
            racing: Stops candidates that will not win; ``None`` stops none.
            seed: As for :meth:`run`.
        """
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
            references=self.references,
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


class _PlansSource(ListSource[None]):
    """A list of plans, whose progress is shown."""

    def __init__(self, jobs: Sequence[Job[None]], report: Callable[[Job[None]], None]) -> None:
        super().__init__(jobs)
        self._report = report

    def finished(self, job: Job[None]) -> None:
        super().finished(job)
        self._report(job)

"""What is picked after a search in noise: `space: auto`, and one method with a number an expert.

    python tests/benchmarks/bench_spaces.py [--seeds 20] [--n-select 120] [--apart 0.2]

Accuracies are smooth functions of known plans; examples are right or wrong, and plans that are
alike are right on mostly the same ones. Every search is as long, knows the published settings and
picks as a study does before it confirms. Gains are in points of the true objective, over the
published setting that is truly the best.
"""

import argparse
import functools
import math
import time
import warnings

import numpy as np
import optuna

from searchmerge.merging.method import DEPTH_SLOPE, METHODS, default_plan
from searchmerge.search.auto_space import auto_space
from searchmerge.search.evidence import Evidence, Measured
from searchmerge.search.sampler import SamplerSetting, make_sampler
from searchmerge.search.searched import Range
from searchmerge.search.space import Alternative, SearchSpace
from searchmerge.search.trials import enqueue

EXPERTS = ("math", "code", "chat")
PUBLISHED = {"tsv": 0.96, "ties": 0.945, "pcb": 0.94, "task_arithmetic": 0.92, "dare": 0.92}
"""What methods reach at their best, before every world moves it a little."""
EXPERT_ACCURACY = 0.9
ALIKE = 0.75  # part of the examples on which chance is the same for all plans
UNITS = {expert: 1 / len(EXPERTS) / EXPERT_ACCURACY for expert in EXPERTS}


class World:
    """A task for each expert, and how good plans are at them.

    Args:
        seed: Of where the best settings are, and of the examples.
        n_select: Examples of each task.
        apart: Standard deviation of what experts' best coefficients differ by, as logarithms.
    """

    def __init__(self, seed, n_select, apart):
        generator = np.random.default_rng([seed, 7])
        self.seed, self.n_select = seed, n_select
        self.best = {m: v + generator.normal(0, 0.012) for m, v in PUBLISHED.items()}
        self.scale = {m: generator.normal(0, 0.3) for m in PUBLISHED}
        self.density = {m: generator.normal(0, 0.1) for m in PUBLISHED}
        self.shift = generator.normal(0, apart, len(EXPERTS))
        self.shift -= self.shift.mean()
        self.easy = generator.random((len(EXPERTS), n_select))

    def accuracies(self, plan):
        """Return each task's true accuracy: most of all its own expert's coefficient counts."""
        published = default_plan(plan.method, EXPERTS).values
        logs = np.log(np.maximum(plan.values["coefficient"][0], 1e-2))
        off = logs - math.log(published["coefficient"][0][0])
        off -= self.scale[plan.method] + self.shift
        value = (
            self.best[plan.method] - 0.02 * float(plan.settings.get(DEPTH_SLOPE.name, 0.0)) ** 2
        )
        if "density" in plan.values:
            best = published["density"][0][0] + self.density[plan.method]
            value -= 0.2 * np.mean((np.array(plan.values["density"][0]) - best) ** 2)
        others = (np.sum(off**2) - off**2) / (len(EXPERTS) - 1)
        return EXPERT_ACCURACY * np.maximum(value - 0.12 * off**2 - 0.05 * others, 0.05)

    def truth(self, plan):
        """Return the objective on infinitely many examples."""
        return float(np.mean(self.accuracies(plan)) / EXPERT_ACCURACY)

    def observations(self, plan):
        """Return which examples of each task are answered right."""
        generator = np.random.default_rng([self.seed, int(plan.digest[:12], 16)])
        observed = {}
        for expert, easy, accuracy in zip(EXPERTS, self.easy, self.accuracies(plan), strict=True):
            redrawn = generator.random(self.n_select) > ALIKE
            luck = np.where(redrawn, generator.random(self.n_select), easy)
            observed[expert] = (luck < accuracy).astype(float)
        return observed


def objective(observed):
    return sum(UNITS[expert] * values.mean() for expert, values in observed.items())


def error_beside(observed, other):
    differences = {expert: observed[expert] - other[expert] for expert in observed}
    return math.sqrt(sum(UNITS[e] ** 2 * d.var(ddof=1) / len(d) for e, d in differences.items()))


def each(method):
    """Return the space of one method with every number an expert's own."""
    declared = METHODS[method].hyperparameters
    rows = {h.name: Range(*h.search, "expert", h.step) for h in declared}
    return SearchSpace(EXPERTS, [Alternative(method, method, values=rows)])


ARMS = {
    "auto": (lambda: auto_space(EXPERTS), "auto"),
    "auto, random": (lambda: auto_space(EXPERTS), "random"),
    "tsv each, gp": (functools.partial(each, "tsv"), "gp"),
    "ties each, random": (functools.partial(each, "ties"), "random"),
    "ties each, gp": (functools.partial(each, "ties"), "gp"),
}


def gain(world, arm, n_trials):
    """Return how much better the pick is than the truly best published setting."""
    make_space, sampler = ARMS[arm]
    space, references = make_space(), {m: default_plan(m, EXPERTS) for m in PUBLISHED}
    setting = SamplerSetting(world.seed, space, n_trials=n_trials)
    study = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, setting))
    for method, plan in references.items():
        if params := space.params(plan):
            enqueue(study, method, params)
    plans, best = {plan.digest: plan for plan in references.values()}, None
    for _ in range(n_trials):
        trial = study.ask()
        plan = space.suggest(trial)
        plans[plan.digest] = plan
        observed = world.observations(plan)
        error = error_beside(observed, best) if best else None
        trial.set_user_attr("result", {"se": error})
        study.tell(trial, objective(observed))
        if best is None or objective(observed) > objective(best):
            best = observed
    seen = {digest: world.observations(plan) for digest, plan in plans.items()}
    pick = Evidence.shrunken(Measured.of(seen, UNITS), list(plans)).best
    return world.truth(plans[pick]) - max(map(world.truth, references.values()))


def gains(arm, *, n_seeds, n_select=120, apart=0.2, n_trials=40):
    """Return the gains of one arm, in points, one a seed: the same worlds for every arm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        worlds = [World(seed, n_select, apart) for seed in range(n_seeds)]
        return 100 * np.array([gain(world, arm, n_trials) for world in worlds])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--n-select", type=int, default=120)
    parser.add_argument("--apart", type=float, default=0.2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print(f"{args.seeds} seeds, {args.trials} trials, {args.n_select} examples of each task")
    for arm in args.arms:
        start = time.perf_counter()
        its = gains(
            arm,
            n_seeds=args.seeds,
            n_select=args.n_select,
            apart=args.apart,
            n_trials=args.trials,
        )
        error = its.std(ddof=1) / math.sqrt(len(its))
        took = time.perf_counter() - start
        print(f"{arm:18s} {its.mean():+.2f} ± {error:.2f}, worst {its.min():+.1f}, {took:.0f} s")


if __name__ == "__main__":
    main()

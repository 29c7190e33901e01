"""A study without models: weights, tasks and evaluators small enough to know the answers of."""

import torch
from torch import nn

from searchmerge.errors import EvaluationError
from searchmerge.evaluators.evaluator import TaskInfo

EXPERTS = ("math", "code", "chat")


class ToyModel(nn.Module):
    """Holds the plan's first coefficients instead of weights."""

    def __init__(self):
        super().__init__()
        self.coefficients = (0.0, 0.0, 0.0)


class ToyMerger:
    """Writes the coefficients of a plan into a toy model, and counts."""

    def __init__(self, model):
        self.model = model
        self.plans = []

    def apply(self, plan):
        self.plans.append(plan)
        self.model.coefficients = plan.values["coefficient"][0]


class ToyEvaluator:
    """Scores each expert's task by how near its coefficient is to the best, with fixed noise."""

    def __init__(self, n_examples=40, fails=lambda plan: False):
        self.tasks = {task: TaskInfo(n_examples) for task in EXPERTS}
        self.best = {"math": 0.9, "code": 0.2, "chat": 0.5}
        self.scored = []
        self._fails = fails

    def score(self, model, task, examples):
        if self._fails(model.coefficients):
            raise EvaluationError(f"task {task!r}: example {examples[0]} has NaN logits")
        self.scored.append((model.coefficients, task, tuple(examples)))
        distance = abs(model.coefficients[EXPERTS.index(task)] - self.best[task])
        noise = torch.rand(1000, generator=torch.Generator().manual_seed(len(task)))
        return tuple(1.0 - distance**2 + 0.1 * float(noise[e]) for e in examples)

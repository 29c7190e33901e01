"""A worker of a small classifier with gradients; a worker's own process can import it."""

import torch
from torch import nn

from searchmerge.evaluators.evaluator import TaskInfo
from searchmerge.execution.worker import Worker
from searchmerge.merging.gradient import CoefficientGradients
from searchmerge.merging.merger import Merger
from searchmerge.merging.task_vectors import TaskVectors
from searchmerge.plan import Groups, MergePlan

EXPERTS = ("math", "code")
PLAN = MergePlan(
    "task_arithmetic", EXPERTS, {"coefficient": ((0.3, 0.9), (0.6, 0.4))}, Groups(depth=2)
)


class Classes:
    """Classifies fixed inputs; labels depend on the task, and ``law`` has no loss."""

    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))

    def __init__(
        self, most_at_once=100, broken=(), steep=(), loss_scale=1.0, asked=None, each=False
    ):
        all_losses = ("labels", "entropy", "agreement")
        self.tasks = {name: TaskInfo(40, losses=all_losses) for name in EXPERTS}
        self.tasks["law"] = TaskInfo(40)
        self._most_at_once = most_at_once
        self._broken, self._steep, self._loss_scale = set(broken), set(steep), loss_scale
        self._each = each
        self._asked = [] if asked is None else asked

    @staticmethod
    def label(task, example):
        return (example + len(task)) % 3

    def _logits(self, model, examples):
        if len(examples) > self._most_at_once:
            raise torch.OutOfMemoryError("CUDA out of memory")
        like = next(model.parameters())
        logits = model(self.inputs[list(examples)].to(like.dtype)).float()
        if self._steep & set(examples):  # the root of 0 is 0, and its slope is infinite
            logits = logits + (logits - logits).sqrt()
        # as what is packed into one row may do, one example spoils all that run with it
        return logits * float("nan") if self._broken & set(examples) else logits

    def score(self, model, task, examples):
        with torch.no_grad():
            logits = self._logits(model, examples)
        labels = torch.tensor([self.label(task, e) for e in examples])
        return tuple((logits.argmax(1) == labels).float().tolist())

    def loss(self, model, task, examples):
        self._asked.append((task, tuple(examples)))
        labels = torch.tensor([self.label(task, e) for e in examples])
        reduction = "none" if self._each else "mean"
        logits = self._logits(model, examples)
        loss = nn.functional.cross_entropy(logits, labels, reduction=reduction)
        return loss * self._loss_scale

    def log_probabilities(self, model, task, examples):
        return self._logits(model, examples).log_softmax(1).unbind()


class Counted:
    """A merger that notes what it is asked for."""

    def __init__(self, merger, applied):
        self._merger, self._applied = merger, applied

    def apply(self, plan):
        self._applied.append(plan)
        self._merger.apply(plan)


def made(dtype=torch.float32):
    """Return a model and a merger of two random experts of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).requires_grad_(False)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    experts = {e: {n: t + 0.5 * torch.randn(t.shape) for n, t in base.items()} for e in EXPERTS}
    targets = dict(model.to(dtype).named_parameters())
    return model, Merger(TaskVectors.from_weights(base, experts), targets=targets, engine="eager")


def worker(applied=None, dtype=torch.float32, **options):
    model, merger = made(dtype)
    evaluators = dict.fromkeys((*EXPERTS, "law"), Classes(**options))
    gradients = CoefficientGradients(model, merger)
    return Worker(
        model, Counted(merger, [] if applied is None else applied), evaluators, gradients
    )

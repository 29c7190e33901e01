"""What holds a copy of the model's weights is told of every merge."""

import torch
from torch import nn

from searchmerge.execution.followed_merger import FollowedMerger


class Fills:
    """A merger that fills the model with a plan's number."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def apply(self, plan):
        self.model.weight.fill_(plan)


class Follows:
    """A follower that notes what it sees."""

    def __init__(self):
        self.seen = []

    def follow(self, model, weights):
        self.seen.append((model, {name: float(t.mean()) for name, t in weights.items()}))


def test_every_follower_sees_the_weights_after_each_merge():
    model = nn.Linear(2, 2)
    weights = {"checkpoint.weight": model.weight.detach()}
    followers = [Follows(), Follows()]
    merger = FollowedMerger(Fills(model), model, weights, followers)
    for plan in (3.0, 5.0):
        merger.apply(plan)
    for follower in followers:
        assert follower.seen == [
            (model, {"checkpoint.weight": 3.0}),
            (model, {"checkpoint.weight": 5.0}),
        ]

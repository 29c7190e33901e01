"""The way that is faster is taken, and passes grow while that pays and fits."""

import pytest
import torch

from searchmerge.evaluators.causal.scoring import CausalScorer
from searchmerge.evaluators.causal.tuning import Way, fastest
from tests.evaluators.models import tiny_model

USUAL, PLAIN = Way(), Way(packs=False)


class Machine:
    """Takes given seconds in each way, and memory by the tokens of a pass; notes what was run."""

    def __init__(self, seconds, *, free=1000, usual=100):
        self._seconds, self._free, self._usual = seconds, free, usual
        self.ran = []

    def run(self, way):
        self.ran.append(way)

    def seconds(self, run):
        run()
        return self._seconds.get(self.ran[-1], 9.0)

    def peak_bytes(self, run):
        run()
        return self._usual * self.ran[-1].growth

    def free_bytes(self):
        return self._free

    def tried(self, *, may_grow=True):
        return list(fastest(self.run, self, may_grow=may_grow).items())


@pytest.mark.parametrize(
    ("packed", "plain", "first"),
    [(1.0, 0.9, PLAIN), (1.0, 0.96, USUAL), (1.0, 2.0, USUAL)],
    ids=["plain is faster", "by too little", "packed is faster"],
)
def test_the_faster_layout_is_taken_if_it_is_worth_it_and_both_are_told(packed, plain, first):
    machine = Machine({USUAL: packed, PLAIN: plain})
    tried = machine.tried(may_grow=False)
    assert tried[0][0] == first
    assert dict(tried) == {USUAL: packed, PLAIN: plain}
    assert machine.ran == [USUAL, USUAL, PLAIN, PLAIN]  # once each before its time is taken


def test_passes_grow_as_long_as_that_pays():
    twice, four = PLAIN._replace(growth=2), PLAIN._replace(growth=4)
    machine = Machine({USUAL: 1.0, PLAIN: 0.5, twice: 0.4, four: 0.39})
    assert next(iter(machine.tried())) == (twice, 0.4)
    assert machine.ran[-1] == four


def test_passes_grow_no_further_than_there_is_memory_free():
    times = {Way(growth=growth): 1 / growth for growth in (1, 2, 4, 8)}
    for free, growth in ((1000, 8), (999, 4), (240, 1)):
        machine = Machine(times, free=free)
        assert machine.tried()[0][0] == Way(growth=growth)
        assert max(way.growth for way in machine.ran) == growth


def test_every_way_gives_the_same_scores_in_float32():
    model, scorer = tiny_model("llama"), CausalScorer(32)
    pairs = [((1, 2, 3 + i % 5, i), (7, 8 + i % 3)) for i in range(40)]
    usual = torch.tensor(scorer.score(model, pairs, 64))
    for way in (PLAIN, Way(growth=4)):
        scorer.way = way
        found = torch.tensor(scorer.score(model, pairs, 64))
        torch.testing.assert_close(found, usual, rtol=1e-5, atol=1e-5)


def test_plain_rows_and_larger_passes_are_what_is_run():
    model, scorer, shapes = tiny_model("llama"), CausalScorer(32), []
    pairs = [((1, 2, 3, 4, 5), (7, 8 + i)) for i in range(12)] + [((9, 2), (3, 4))] * 2
    scorer.score(model, pairs, 64)  # finds out whether rows may be packed
    model.register_forward_pre_hook(
        lambda module, arguments, options: shapes.append(tuple(options["input_ids"].shape)),
        with_kwargs=True,
    )
    sizes = {}
    for way in (USUAL, PLAIN, PLAIN._replace(growth=4)):
        shapes.clear()
        scorer.way = way
        pairs = [(tuple(context), tuple(tokens)) for context, tokens in pairs]
        scorer.score(model, pairs, 64)
        sizes[way] = list(shapes)
    assert sizes[USUAL] != sizes[PLAIN]
    assert len(sizes[PLAIN._replace(growth=4)]) <= len(sizes[PLAIN])


def test_a_pass_that_does_not_fit_makes_no_other_way_smaller(caplog):
    model, scorer, most = tiny_model("llama"), CausalScorer(32), 64

    def refuse(module, arguments, options):
        if options["input_ids"].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    pairs = [((1, 2, 3 + i % 5, i), (7, 8 + i % 3)) for i in range(40)]
    scorer.way = Way(growth=8)
    scorer.score(model, pairs, 64)
    assert "does not fit" in caplog.text
    caplog.clear()
    scorer.way = USUAL
    scorer.score(model, pairs, 64)
    assert caplog.text == ""

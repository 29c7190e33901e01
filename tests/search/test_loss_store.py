"""What a refinement was told outlives a kill, and is not asked again."""

import sqlite3
from dataclasses import replace

import pytest

from searchmerge.errors import EvaluationError, StudyError
from searchmerge.execution.gradient import LossResult
from searchmerge.search.loss_store import LossStore, remembered
from searchmerge.search.refine import refinement
from tests.search.test_refine import MATERIAL, N_BEFORE, RECIPE, START, Cliff, run

ROWS = ((1e-300, -0.7), (2.0, 1e17))
LEFT_OUT = {"math": {12: "its loss is inf"}}
RESULT = LossResult({"math": (0.1, 1 / 3)}, ROWS, 0.25, 1.5, LEFT_OUT)


@pytest.fixture
def store(tmp_path):
    store = LossStore(tmp_path / "scores.db")
    yield store
    store.close()


def test_what_is_kept_comes_back_to_the_last_digit(store):
    store.put("a", 0, START, RESULT)
    assert store.get("a", 0, START) == RESULT
    assert store.n_kept("a") == 1
    other = replace(START, values={"coefficient": ((0.5, 0.5),) * 3})
    for key, number, plan in [("a", 1, START), ("b", 0, START), ("a", 0, other)]:
        assert store.get(key, number, plan) is None


def test_that_there_is_no_answer_is_kept_with_its_reason(store):
    store.put("a", 0, START, EvaluationError("the loss is nan"))
    kept = store.get("a", 0, START)
    assert isinstance(kept, EvaluationError)
    assert str(kept) == "the loss is nan"


def test_what_has_ended_is_forgotten(store):
    for key in "ab":
        store.put(key, 0, START, RESULT)
    store.forget("a")
    assert (store.n_kept("a"), store.n_kept("b")) == (0, 1)


def test_a_row_that_was_changed_is_told_from_one_that_was_not(store, tmp_path):
    store.put("a", 0, START, RESULT)
    with sqlite3.connect(tmp_path / "scores.db") as connection:
        connection.execute("UPDATE loss_answers SET result = replace(result, '0.25', '0.26')")
    with pytest.raises(StudyError, match="answer 0 of refinement a is not as it was written"):
        store.get("a", 0, START)


def cut_off_after(n_answers, store, n_before=0, fails=lambda n_asked, request: False):
    """Go on with a refinement until so many answers more; return what it proposed, and asked."""
    course = remembered(refinement(START, RECIPE, MATERIAL), store, "a")
    bowl = Cliff(lambda n_asked, request: fails(n_before + n_asked, request))
    try:
        ask = next(course)
        for _ in range(n_answers):
            try:
                answer = bowl.answer(*ask)
            except EvaluationError as error:
                ask = course.throw(error)
            else:
                ask = course.send(answer)
    except StopIteration as ended:
        return ended.value, bowl.asked
    course.close()
    return None, bowl.asked


@pytest.mark.parametrize("n_answers", [1, 7, 40])
def test_a_refinement_that_is_cut_off_again_and_again_asks_nothing_twice(store, n_answers):
    refined, alone = run()
    asked = []
    while len(asked) < len(alone.asked):
        proposed, more = cut_off_after(n_answers, store)
        asked += more
    assert asked == alone.asked
    assert proposed == refined
    assert cut_off_after(0, store) == (refined, [])


@pytest.mark.parametrize("n_answers", [1, 7])
def test_one_that_failed_late_is_not_asked_again_what_failed(store, n_answers):
    def fails(n_asked, request):
        return n_asked == N_BEFORE

    refined, alone = run(bowl=Cliff(fails))
    asked = []
    while len(asked) < len(alone.asked):
        proposed, more = cut_off_after(n_answers, store, len(asked), fails)
        asked += more
    assert asked == alone.asked
    assert proposed == refined

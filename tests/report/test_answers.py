"""What models said, as a person reads it."""

from searchmerge.evaluators.evaluator import Answer, TaskInfo
from searchmerge.report.answers import answers_table, explained_zero

INFO = TaskInfo(8, reading_keys=("chat_template", "filter"))


def test_the_first_answers_are_told_with_what_was_read_in_them_and_the_keys_to_look_at():
    answers = [
        Answer(5, expected="12", said=("The answer is 12",), read=("[invalid]",)),
        Answer(7, expected="3", said=("x" * 300, "y"), read=()),
        Answer(9, said=("not shown",)),
    ]
    told = explained_zero(answers, INFO)
    assert told.startswith(
        "what it said first: example 5: it said 'The answer is 12', read in it was '[invalid]', "
        "right is '12'; example 7: it said 'xxx"
    )
    assert "xxx'..., 'y', read in it was nothing, right is '3'; look at the task's keys " in told
    assert "keys chat_template, filter: whether" in told
    assert "not shown" not in told
    assert explained_zero([], INFO) == ""


def test_answers_stand_side_by_side_with_what_was_read_where_that_is_something_else():
    best = [Answer(5, {}, "how many?", "12", ("it is 12",), ("12",))]
    base = [Answer(5, {}, "how many?", "12", ("twelve",), ("twelve",))]
    header, cells = answers_table([("best", best), ("base", base)])
    assert header == ["example", "question", "right", "best", "base"]
    assert cells == [["5", "how many?", "12", "it is 12 => 12", "twelve"]]

"""What models said, for a person to read: side by side, or where an expert scores nothing."""

from collections.abc import Sequence

from searchmerge.evaluators.evaluator import Answer, TaskInfo

_N_SHOWN = 2
_WIDTH = 200
"""Characters of an answer that an error shows."""


def explained_zero(answers: Sequence[Answer], info: TaskInfo) -> str:
    """Return what an expert that scores 0 said first, and what to look at; nothing if unknown."""
    if not answers:
        return ""
    lines = [
        f"example {answer.example}: it said {_short(answer.said)}, read in it was "
        f"{_short(answer.read)}, right is {answer.expected!r}"
        for answer in answers[:_N_SHOWN]
    ]
    keys = ", ".join(info.reading_keys)
    return (
        f"what it said first: {'; '.join(lines)}; look at the task's keys {keys}: whether it is "
        "asked as it was trained, and its answers are read as they come"
    )


def answers_table(
    answers: Sequence[tuple[str, Sequence[Answer]]],
) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of plans' answers side by side.

    Args:
        answers: The name of each plan and what it said to the same examples.
    """
    header = ["example", "question", "right", *(name for name, _ in answers)]
    cells = [
        [str(same[0].example), same[0].question, same[0].expected, *map(_both, same)]
        for same in zip(*(said for _, said in answers), strict=True)
    ]
    return header, cells


def _both(answer: Answer) -> str:
    """Return what was said, and what was read in it where that is something else."""
    said, read = " | ".join(answer.said), " | ".join(answer.read)
    return said if read in ("", said) else f"{said} => {read}"


def _short(texts: Sequence[str]) -> str:
    shown = ", ".join(repr(text[:_WIDTH]) + "..." * (len(text) > _WIDTH) for text in texts)
    return shown or "nothing"

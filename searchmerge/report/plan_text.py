"""A plan as reports show it: in full, or what its numbers are like where they are many."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from searchmerge.plan import MergePlan, Rows
from searchmerge.report.escape import code, code_block, code_cell, markdown
from searchmerge.search.directory import plan_file
from searchmerge.tensor_names import compress, expand, in_order
from searchmerge.wording import counted

_MOST_LINES = 30  # of a plan that is shown in full
_MOST_KINDS = 40  # of tensors that have a line each where it is not


def plan_text(plan: MergePlan, name: str) -> str:
    """Return a plan in Markdown, of which all is in a file of the run directory as well.

    Args:
        plan: The plan.
        name: What it is called, which tells its file.
    """
    in_full = plan.to_yaml()
    if not plan.groups.tensors or len(in_full.splitlines()) <= _MOST_LINES:
        return code_block(in_full, "yaml")
    settings = ", ".join(f"{setting} {value}" for setting, value in plan.settings.items())
    more = f" ({markdown(settings)})" if settings else ""
    numbers = code(str(plan_file(Path(), name)))
    header = "| | " + " | ".join(map(markdown, plan.experts)) + " |"
    lines = [line for each, rows in plan.values.items() for line in _lines(plan, each, rows)]
    return "\n".join(
        (
            f"{code(plan.method)}{more}, with values of their own for each of "
            f"{counted(len(plan.groups), 'tensor')}. Below are their mean over tensors and, in "
            f"brackets, the least and the greatest; all of them are in {numbers}.",
            "",
            header,
            "|---" * (1 + len(plan.experts)) + "|",
            *lines,
        )
    )


def _lines(plan: MergePlan, name: str, rows: Rows) -> list[str]:
    """Return the lines of a hyper-parameter: of all tensors, and of those that differ in layer."""
    row_of = dict(zip(plan.groups.tensors, rows, strict=True))
    first = _line(f"{markdown(name)}, all tensors", rows)
    kinds = compress(in_order(row_of))
    if len(set(rows)) == 1 or len(kinds) > _MOST_KINDS:
        return [first]
    return [first] + [_line(code_cell(k), [row_of[t] for t in expand(k)]) for k in kinds]


def _line(what: str, rows: Sequence[Sequence[float]]) -> str:
    of_experts = np.array(rows).T
    return f"| {what} | " + " | ".join(_cell(numbers.tolist()) for numbers in of_experts) + " |"


def _cell(numbers: Sequence[float]) -> str:
    least, mean, greatest = min(numbers), float(np.mean(numbers)), max(numbers)
    return f"{least:.4g}" if least == greatest else f"{mean:z.2f} [{least:z.2f}, {greatest:z.2f}]"

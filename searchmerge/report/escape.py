"""Users' names as they are written into Markdown and HTML: shown as they are, never obeyed."""

import html
import re

from searchmerge.errors import printable

_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_MARKS = re.compile(
    r"[\\`*|]"  # escapes, code, emphasis, cells of a table
    r"|\](?=[(\[:])"  # what makes a link of the text in brackets before it
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis; within a word it is none
    r"|~(?=~)"
    r"|^\[|^[-+#](?=\s)"  # what begins the definition of a link, a list or a heading
)


def markdown(text: str) -> str:
    """Return text that Markdown shows as it is, in a line or in the cell of a table."""
    return _MARKS.sub(r"\\\g<0>", printable(text).translate(_ENTITIES))


def code(text: str) -> str:
    """Return text as Markdown shows it in the type of code, in a line; not in a table."""
    text = printable(text)
    fence = _fence(text, 1)
    space = " " if text[:1] in ("`", "") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def code_cell(text: str) -> str:
    """Return text as Markdown shows it in the type of code, in the cell of a table."""
    return code(text).replace("|", "\\|")


def code_block(text: str, language: str = "") -> str:
    """Return lines of text as a block of code."""
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def html_text(text: str) -> str:
    """Return text that HTML, and the labels of plotly, show as it is."""
    return html.escape(printable(text))


def _fence(text: str, shortest: int) -> str:
    """Return more backticks than stand in a row in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(shortest, longest + 1)

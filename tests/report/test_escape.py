"""Names in Markdown and HTML, read back by a parser of each."""

import html

import pytest
from markdown_it import MarkdownIt

from searchmerge.report.escape import code, code_block, code_cell, html_text, markdown

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = [
    "plain_name_of 3.5 [1.2, 3.4] (best) 100 %",
    "<script>alert(1)</script>",
    "a | b",
    "[/x]",
    "[text](https://host)",
    "![text](https://host)",
    "[text][1]",
    "*bold* **more** _less_ __even__ in_word",
    "~~gone~~ ~",
    "`code` ``more`` \\`",
    "back\\slash \\| \\\\|",
    "&amp; &lt; &#124;",
    "# no heading",
    "<!-- no comment",
    "<https://host>",
    "``` fence",
    "end with `",
]


def leaves(tokens):
    for token in tokens:
        yield token
        yield from leaves(token.children or [])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_shown_as_it_is_in_a_cell_of_a_table(name):
    text = f"| x | **{markdown(name)}** | y |\n|---|---|---|\n| {markdown(name)} | b | c |\n"
    tokens = list(leaves(PARSER.parse(text)))
    kinds = {token.type for token in tokens}
    assert not kinds & {
        "html_inline",
        "html_block",
        "link_open",
        "image",
        "code_inline",
        "em_open",
        "s_open",
    }
    cells = [
        "".join(part.content for part in token.children if part.type in ("text", "text_special"))
        for token in tokens
        if token.type == "inline"
    ]
    assert cells == ["x", name, "y", name, "b", "c"]


@pytest.mark.parametrize("name", HOSTILE)
def test_code_is_shown_as_it_is(name):
    line = list(leaves(PARSER.parse(f"see {code(name)} there")))
    (shown,) = [token.content for token in line if token.type == "code_inline"]
    assert shown == name
    (cell,) = [
        token.content
        for token in leaves(PARSER.parse(f"| a |\n|---|\n| {code_cell(name)} |\n"))
        if token.type == "code_inline"
    ]
    assert cell == name
    (block,) = [t for t in PARSER.parse(code_block(f"{name}\n```\n", "yaml")) if t.type == "fence"]
    assert block.content == f"{name}\n```\n"


@pytest.mark.parametrize("name", HOSTILE)
def test_html_shows_a_name_as_it_is(name):
    assert html.unescape(html_text(name)) == name
    assert not set("<>\"'") & set(html_text(name))


def test_names_stay_in_their_line():
    for write in (markdown, code, html_text):
        assert "\n" not in write("a\n\n# b\x1b[2J\u202e")
        assert write("a\nb") != write("a b")

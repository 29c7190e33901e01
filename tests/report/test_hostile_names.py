"""The report, the card and the picture of a study whose names are meant to break them."""

import json
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from searchmerge.plan import MergePlan
from searchmerge.report.card import model_card
from searchmerge.report.front import save_front
from searchmerge.report.results import Point, Results, Row

NAMES = ("[/x]", "<script>alert(1)</script>", "a | b", "c\n# d", "```\ne", "[f](https://host)")
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")


@pytest.fixture
def results():
    tasks = dict.fromkeys(NAMES, "acc")
    scores = dict.fromkeys(NAMES, 0.5)
    plan = MergePlan("ties", NAMES, {"coefficient": ((0.5,) * len(NAMES),)})
    return Results(
        study=NAMES[1],
        tasks=tasks,
        objective="mean",
        rows=[Row(f"expert {n}", scores, scores, (0.5, 0.4, 0.6), False) for n in NAMES],
        winner=f"expert {NAMES[0]}",
        verdict=f"The best is {NAMES[1]} [1.2, 3.4].",
        plan=plan.to_dict(),
        counts={"trials": 3},
        level=0.95,
        made_of={name: f"{name}, 0123" for name in NAMES},
        points=[Point(name, scores, "front") for name in NAMES],
        failed=f"1 of 3 trials failed, as: {' '.join(NAMES)}",
    )


def kinds(tokens):
    for token in tokens:
        yield token.type
        yield from kinds(token.children or [])


@pytest.fixture
def card(results):
    sources = {name: name for name in NAMES}
    return model_card(results, NAMES[1], sources, {NAMES[0]: NAMES}, {"exclude": "[a]"})


def test_no_name_is_obeyed_in_the_report_or_the_card(results, card):
    for text in (results.markdown(), card.split("---\n", 2)[2]):
        tokens = PARSER.parse(text)
        assert not {"html_inline", "html_block", "link_open", "image"} & set(kinds(tokens))
        assert [t.tag for t in tokens if t.type == "heading_open"].count("h1") == 1
        lines = [token.map[0] for token in tokens if token.type == "tr_open"]
        assert len(lines) == len(set(lines)) > len(NAMES)
        assert "&lt;script&gt;" in text


def test_the_metadata_of_a_card_is_read_back(card):
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata == {"library_name": "transformers", "tags": ["searchmerge"]}


def test_a_page_shows_names_and_runs_none(results, tmp_path):
    page = save_front(results.points, NAMES[1], NAMES[1], tmp_path).read_text()
    assert "<script>alert(1)" not in page
    assert "alert(1)" in page
    drawn = re.findall(r"Plotly\.newPlot\(\s*\"[^\"]*\",\s*(\[.*?\]),\s*\{", page, re.DOTALL)
    (traces,) = (json.loads(text) for text in drawn)
    shown = {label for trace in traces for label in trace.get("text", ())}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown

"""The page of the front draws each kind of plan, and marks the one that is saved."""

import json
import re

import pytest

from searchmerge.errors import StudyError
from searchmerge.report.front import FRONT_FILE, save_front
from searchmerge.report.results import Point


def drawn(run_dir):
    """Return the traces and the layout of the page, by what plotly is asked to draw."""
    page = (run_dir / FRONT_FILE).read_text(encoding="utf-8")
    call = page[page.rindex("Plotly.newPlot(") :]
    decoder = json.JSONDecoder()
    traces, end = decoder.raw_decode(call, call.index("["))
    layout, _ = decoder.raw_decode(call, end + re.search(r"\{", call[end:]).start())
    return traces, layout


def test_two_objectives_are_a_scatter_with_the_front_joined_and_the_winner_marked(
    points, tmp_path
):
    path = save_front(points, "trial 3", "toy", tmp_path)
    assert path == tmp_path / FRONT_FILE
    traces, layout = drawn(tmp_path)
    by_name = {trace["name"]: trace for trace in traces}
    assert list(by_name) == ["trials", "baselines", "front", "saved: trial 3"]
    front = by_name["front"]
    assert (front["text"], front["x"], front["y"]) == (
        ["trial 1", "trial 3"], [0.2, 0.75], [0.9, 0.5],
    )  # fmt: skip
    assert front["mode"] == "lines+markers"
    assert by_name["trials"]["mode"] == by_name["baselines"]["mode"] == "markers"
    assert (by_name["saved: trial 3"]["x"], by_name["saved: trial 3"]["y"]) == ([0.75], [0.5])
    assert layout["title"]["text"] == "toy"
    assert layout["xaxis"]["title"]["text"] == "math, over its own expert"
    assert layout["yaxis"]["title"]["text"] == "code, over its own expert"


def test_an_objective_that_is_over_no_expert_is_not_called_that(points, tmp_path):
    save_front(points, "trial 3", "toy", tmp_path, raw=("code",))
    _, layout = drawn(tmp_path)
    assert layout["xaxis"]["title"]["text"] == "math, over its own expert"
    assert layout["yaxis"]["title"]["text"] == "code"


def test_three_objectives_are_lines_one_a_plan(points, tmp_path):
    wider = [Point(p.name, {**p.values, "chat": 0.3}, p.kind) for p in points]
    save_front(wider, "trial 3", "toy", tmp_path)
    traces, layout = drawn(tmp_path)
    assert [trace["text"][0] for trace in traces] == ["trial 2", "TIES", "trial 1", "trial 3"]
    assert all(trace["x"] == ["math", "code", "chat"] for trace in traces)
    assert [trace["y"] for trace in traces if trace["name"] == "front"] == [
        [0.2, 0.9, 0.3], [0.75, 0.5, 0.3],
    ]  # fmt: skip
    assert [trace["showlegend"] for trace in traces] == [True, True, True, False]
    assert layout["yaxis"]["title"]["text"] == "over own expert"


def test_a_winner_that_is_no_point_is_not_marked(points, tmp_path):
    save_front(points, "trial 9", "toy", tmp_path)
    assert len(drawn(tmp_path)[0]) == 3


def test_a_page_that_cannot_be_written_is_an_error_of_the_study(points, tmp_path):
    with pytest.raises(StudyError, match=r"front\.html: cannot be written: No such file"):
        save_front(points, "trial 3", "toy", tmp_path / "nowhere")

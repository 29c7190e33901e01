"""The picture of a study with several objectives: all that was scored in full, and the front."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from searchmerge.durable import write_atomically
from searchmerge.errors import StudyError
from searchmerge.report.escape import html_text
from searchmerge.report.results import Point, PointKind

FRONT_FILE = "front.html"
_LOOK: dict[PointKind, tuple[str, str, str]] = {
    "trial": ("trials", "#b0b7c3", "circle"),
    "reference": ("baselines", "#d9822b", "diamond"),
    "front": ("front", "#1f6feb", "circle"),
}


def save_front(
    points: Sequence[Point], winner: str, title: str, run_dir: Path, raw: Collection[str] = ()
) -> Path:
    """Write a self-contained page with the front, and return where it is.

    Two objectives are drawn as a scatter, the front joined by a line; three or more as parallel
    coordinates, one line a plan.

    Args:
        points: All that was scored in full, with two values or more each.
        winner: Name of the point that was picked.
        title: What stands above it.
        run_dir: The study's run directory.
        raw: Objectives that are scores as they are, over no own expert's.

    Raises:
        StudyError: If it cannot be written.
    """
    labels = {n: n if n in raw else f"{n}, over its own expert" for n in points[0].values}
    if len(labels) == 2:
        figure = _scatter(points, winner, labels)
    else:
        figure = _parallel(points, "score" if raw else "over own expert")
    figure.update_layout(title=html_text(title), template="plotly_white")
    path = run_dir / FRONT_FILE
    try:
        write_atomically(path, figure.to_html(include_plotlyjs=True))
    except OSError as error:
        raise StudyError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _scatter(points: Sequence[Point], winner: str, labels: Mapping[str, str]) -> Any:
    """Return the figure of two objectives, one axis each with its label."""
    import plotly.graph_objects as go

    first, second = points[0].values
    figure = go.Figure()
    for kind, (label, colour, symbol) in _LOOK.items():
        drawn = _of_kind(points, kind)
        figure.add_scatter(
            x=[point.values[first] for point in drawn],
            y=[point.values[second] for point in drawn],
            text=[html_text(point.name) for point in drawn],
            mode="lines+markers" if kind == "front" else "markers",
            line={"shape": "vh", "width": 1.5},
            marker={"color": colour, "symbol": symbol, "size": 9},
            name=label,
        )
    for point in (point for point in points if point.name == winner):
        figure.add_scatter(
            x=[point.values[first]],
            y=[point.values[second]],
            text=[html_text(winner)],
            mode="markers",
            marker={"symbol": "circle-open", "size": 18, "color": "#d73a49", "line": {"width": 2}},
            name=html_text(f"saved: {winner}"),
        )
    return figure.update_layout(
        xaxis_title=html_text(labels[first]),
        yaxis_title=html_text(labels[second]),
    )


def _parallel(points: Sequence[Point], unit: str) -> Any:
    """Return the figure of three objectives or more, one line a plan."""
    import plotly.graph_objects as go

    names = list(points[0].values)
    figure = go.Figure()
    for kind, (label, colour, _) in _LOOK.items():
        for index, point in enumerate(_of_kind(points, kind)):
            figure.add_scatter(
                x=[html_text(name) for name in names],
                y=list(point.values.values()),
                text=[html_text(point.name)] * len(names),
                mode="lines+markers",
                line={"color": colour, "width": 2.5 if kind == "front" else 1},
                name=label,
                legendgroup=label,
                showlegend=index == 0,
            )
    return figure.update_layout(yaxis_title=unit)


def _of_kind(points: Sequence[Point], kind: PointKind) -> list[Point]:
    """Return the points of a kind in the order of their first values."""
    return sorted(
        (point for point in points if point.kind == kind),
        key=lambda point: next(iter(point.values.values())),
    )

"""The picture of a study with several objectives: all that was scored in full, and the front."""

from collections.abc import Sequence
from pathlib import Path

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


def save_front(points: Sequence[Point], winner: str, title: str, run_dir: Path) -> Path:
    """Write a self-contained page with the front, and return where it is.

    Two objectives are drawn as a scatter, the front joined by a line; three or more as parallel
    coordinates, one line a plan.

    Args:
        points: All that was scored in full, with two values or more each.
        winner: Name of the point that was picked.
        title: What stands above it.
        run_dir: The study's run directory.

    Raises:
        StudyError: If it cannot be written.
    """
    import plotly.graph_objects as go

    names = list(points[0].values)
    figure = go.Figure()
    for kind, (label, colour, symbol) in _LOOK.items():
        own = sorted((p for p in points if p.kind == kind), key=lambda p: p.values[names[0]])
        if len(names) == 2:
            figure.add_scatter(
                x=[p.values[names[0]] for p in own],
                y=[p.values[names[1]] for p in own],
                text=[html_text(p.name) for p in own],
                mode="lines+markers" if kind == "front" else "markers",
                line={"shape": "vh", "width": 1.5},
                marker={"color": colour, "symbol": symbol, "size": 9},
                name=label,
            )
        else:
            for index, point in enumerate(own):
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
    picked = [p for p in points if p.name == winner]
    if picked and len(names) == 2:
        figure.add_scatter(
            x=[picked[0].values[names[0]]],
            y=[picked[0].values[names[1]]],
            text=[html_text(winner)],
            mode="markers",
            marker={"symbol": "circle-open", "size": 18, "color": "#d73a49", "line": {"width": 2}},
            name=html_text(f"saved: {winner}"),
        )
    figure.update_layout(
        title=html_text(title),
        template="plotly_white",
        xaxis_title=f"{html_text(names[0])}, over its own expert" if len(names) == 2 else None,
        yaxis_title=(
            f"{html_text(names[1])}, over its own expert" if len(names) == 2 else "over own expert"
        ),
    )
    path = run_dir / FRONT_FILE
    try:
        write_atomically(path, figure.to_html(include_plotlyjs=True))
    except OSError as error:
        raise StudyError(f"{path}: cannot be written: {error.strerror}") from error
    return path

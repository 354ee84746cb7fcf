"""compare.html: one self-contained page with what a comparison of strategies showed."""

from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ..comparison import BEFORE, Method, Spread, clients_of, columns_of
from ..comparison_page import Comparison, cell_of, name_of, settings_text
from .report import HEAD, as_html, table_of

COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#1f2933", "#b7791f", "#9aa5b1")
PAGE = (
    HEAD
    + """<p class="note">{command}</p>
{figures}
<h2>Adaptation of unseen clients</h2>
<p class="note">Mean accuracy over seeds, each client counting once; bars are one standard
deviation over seeds.</p>
{adaptation}
<h2>Single clients</h2>
<p class="note">Accuracy of each unseen client of each seed, after the chosen number of steps.</p>
{clients}
<h2>Progress by round</h2>
<p class="note">Validation clients after the most steps, a line for each seed.</p>
{progress}
<h2>Chosen settings</h2>
{chosen}
</body>
</html>
"""
)


def render_comparison(comparison: Comparison) -> str:
    """Return the page, as HTML that needs no network."""
    names = ", ".join(one.strategy for one in comparison.methods)
    return PAGE.format(
        title=escape(f"{comparison.dataset}: {names}"),
        script=get_plotlyjs(),
        command=escape(comparison.command),
        figures=table_of([(one.strategy, _figures(one)) for one in comparison.methods]),
        adaptation=_adaptation(comparison),
        clients=_clients(comparison),
        progress=_progress(comparison),
        chosen=table_of(
            [(one.strategy, settings_text(one.chosen.settings)) for one in comparison.methods]
        ),
    )


def _figures(one: Method) -> str:
    found = one.summary
    cells = [f"{name_of(c)} {cell_of(Spread(**told))}%" for c, told in found["accuracy"].items()]
    costs = f"{found['bytes'] / 1e6:.2f} MB, {found['seconds']:.1f} s, {found['rounds']:g} rounds"
    return "; ".join([*cells, costs])


def _adaptation(comparison: Comparison) -> str:
    figure = go.Figure()
    steps: list[int] = []
    for place, one in enumerate(comparison.methods):
        told = one.summary["accuracy"]
        steps = [0 if column == BEFORE else int(column) for column in told]
        figure.add_scatter(
            x=steps,
            y=[value["mean"] for value in told.values()],
            error_y={"type": "data", "array": [value["sd"] or 0.0 for value in told.values()]},
            mode="lines+markers",
            line={"color": _color(place)},
            name=one.strategy,
        )
    return as_html(figure, "adaptation steps", ticks=steps)


def _clients(comparison: Comparison) -> str:
    figure = go.Figure()
    for place, one in enumerate(comparison.methods):
        figure.add_box(
            y=[
                value
                for run in one.runs.values()
                for value in clients_of(run, one.chosen.validation.steps)
            ],
            boxpoints="all",
            marker={"color": _color(place), "size": 4},
            name=one.strategy,
        )
    return as_html(figure, "strategy")


def _progress(comparison: Comparison) -> str:
    figure = go.Figure()
    for place, one in enumerate(comparison.methods):
        for number, run in enumerate(one.runs.values()):
            validated = [entry for entry in run["history"] if entry["validation"]]
            figure.add_scatter(
                x=[entry["round"] for entry in validated],
                y=[entry["validation"]["accuracy_after"][_last(one)] for entry in validated],
                mode="lines",
                line={"color": _color(place)},
                name=one.strategy,
                legendgroup=one.strategy,
                showlegend=number == 0,
            )
    return as_html(figure, "round")


def _last(one: Method) -> str:
    return columns_of(next(iter(one.runs.values())))[-1]


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]

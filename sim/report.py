"""report.html: one self-contained page with what a run showed."""

from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ..planning import at_most

INK, MUTED, ACCENT, SECOND = "#1f2933", "#9aa5b1", "#2b6cb0", "#c05621"
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>metabloom: {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2933; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; }}
td {{ padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }}
.figures td {{ font-variant-numeric: tabular-nums; }}
.note {{ color: #616e7c; }}
</style>
<script>{script}</script>
</head>
<body>
<h1>{title}</h1>
"""
BODY = """{summary}
{privacy}
<h2>Adaptation of unseen clients</h2>
<p class="note">{adaptation_note}</p>
{adaptation}
<h2>Progress by round</h2>
<p class="note">{progress_note}</p>
{progress}
{failures}
{quarantined}
<h2>Configuration</h2>
{configuration}
</body>
</html>
"""
PAGE = HEAD + BODY
ADAPTATION_NOTE = (
    "Query accuracy of clients that took no part in training, by adaptation steps on their support "
    "sets. Each thin line is a client; the thick line is their mean, each client counting once."
)
PROGRESS_NOTE = "Validation clients, mean accuracy before and after adaptation."
WITHHELD = (
    "evaluation metrics are withheld: privacy.unprotected-metrics names what may leave the clients"
)
REASONS = 5  # failed replies that the report shows; results.json has all


def render_report(results: dict[str, Any]) -> str:
    """Return the page for the content of results.json, as HTML that needs no network."""
    title = f"{results['strategy']} on {results['dataset']}, seed {results['seed']}"
    return PAGE.format(
        title=escape(title),
        script=get_plotlyjs(),
        summary=_summary(results),
        privacy=_privacy(results),
        adaptation_note=ADAPTATION_NOTE,
        adaptation=_adaptation_curves(results["unseen"], withheld=_are_withheld(results)),
        progress_note=PROGRESS_NOTE,
        progress=_progress(results["history"], withheld=_are_withheld(results)),
        failures=_bad_replies(results, "failures", "Failed replies"),
        quarantined=_bad_replies(results, "quarantined", "Quarantined replies"),
        configuration=table_of([(k, str(v)) for k, v in results["config"].items()]),
    )


def privacy_lines(results: dict[str, Any]) -> list[str]:
    """Return what the content of results.json says of privacy, in a line each; none without it."""
    lines = []
    privacy = results.get("privacy", {})
    if record := privacy.get("record_level"):
        spent = "nothing was released"
        if record["clients"]:
            most, middle = _bound(record["epsilon_max"]), _bound(record["epsilon_median"])
            spent = f"epsilon at most {most} (median {middle}) at delta {record['delta']:g}"
        lines.append(
            f"privacy: {spent} over {record['clients']} clients; {record['exhausted']} exhausted; "
            f"protects one record against {record['protects_against']}"
        )
    if _are_withheld(results):
        lines.append(WITHHELD)
    if user := privacy.get("user_level"):
        lines.append(
            f"privacy of whole clients: epsilon at most {_bound(user['epsilon'])} at delta "
            f"{user['delta']:g} ({user['adjacency']}); protects one client against "
            f"{user['protects_against']}"
        )
        if user.get("seeded"):
            lines.append("WARNING: that noise was seeded: it protects nobody")
    return lines


def ending_line(results: dict[str, Any]) -> str:
    """Return what the content of results.json says of an early end and a best model, or ""."""
    told = results.get("ending")
    if told is None:
        return ""
    why = f", {told['reason']}" if told["reason"] else ""
    number = told["model_round"]
    model = "" if number is None else f"; the model is that of round {number}, the best validated"
    return f"after round {told['rounds']}{why}{model}"


def _are_withheld(results: dict[str, Any]) -> bool:
    """Return whether private clients kept all their evaluation metrics to themselves."""
    record = results.get("privacy", {}).get("record_level")
    return bool(record) and not record["unprotected_metrics"]


def _target(epsilon: float | None) -> str:
    return "each node's own" if epsilon is None else f"epsilon {epsilon:g}"


def _privacy(results: dict[str, Any]) -> str:
    """Return the figures of privacy; nothing where there was none."""
    privacy, rows = results.get("privacy", {}), []
    if record := privacy.get("record_level"):
        metrics = ", ".join(record["unprotected_metrics"]) or "none, they are withheld"
        rows += [
            ("protected", f"{record['unit']}, against {record['protects_against']}"),
            ("epsilon of a client, at most", _bound(record["epsilon_max"])),
            ("median", _bound(record["epsilon_median"])),
            ("at delta", f"{record['delta']:g}"),
            ("target", _target(record["target_epsilon"])),
            ("clients that released", str(record["clients"])),
            ("exhausted clients", str(record["exhausted"])),
            ("metrics sent without protection", metrics),
        ]
    if user := privacy.get("user_level"):
        rows += [
            ("protected", f"one client ({user['adjacency']}), against {user['protects_against']}"),
            ("epsilon, at most", _bound(user["epsilon"])),
            ("at delta", f"{user['delta']:g}"),
            *([("not covered", user["not_covered"])] if "not_covered" in user else []),
        ]
    return f"<h2>Privacy</h2>\n{table_of(rows)}" if rows else ""


def _bound(epsilon: float | None) -> str:
    return "-" if epsilon is None else at_most(epsilon)


def _summary(results: dict[str, Any]) -> str:
    unseen, clients = results["unseen"], results["clients"]
    dropped = results.get("dropped")
    rows = [
        ("clients", ", ".join(f"{count} {role}" for role, count in clients.items()) or "none"),
        *([("left out, too small for the split", str(dropped))] if dropped else []),
        ("rounds", str(results["rounds"])),
        *([("ending", line)] if (line := ending_line(results)) else []),
        ("accuracy of unseen clients before adaptation", _percent(unseen["accuracy_before"])),
        *(
            (f"after {steps} step{'s' if steps != '1' else ''}", _percent(value))
            for steps, value in unseen["accuracy_after"].items()
        ),
        ("sent down / up", f"{_mib(results['bytes_down'])} / {_mib(results['bytes_up'])}"),
        ("time", f"{results['seconds']:.1f} s"),
        ("failed replies", str(results["failures"])),
        ("quarantined replies", str(results.get("quarantined", 0))),
        *([("skipped rounds", str(results["skipped"]))] if results.get("skipped") else []),
    ]
    return table_of(rows)


def _adaptation_curves(unseen: dict[str, Any], *, withheld: bool) -> str:
    if not unseen["per_client"]:
        return "<p>No unseen client was evaluated.</p>"
    steps = [0, *(int(step) for step in unseen["accuracy_after"])]
    names = ["accuracy-before", *(f"accuracy-after-{step}" for step in steps[1:])]
    if all(one.get(name) is None for one in unseen["per_client"] for name in names):
        known = "Their losses are in results.json."
        return (
            f"<p>The clients report no accuracy. {_sentence(WITHHELD) if withheld else known}</p>"
        )
    figure = go.Figure()
    for one in unseen["per_client"]:
        figure.add_scatter(
            x=steps,
            y=[one.get(name) for name in names],
            mode="lines",
            line={"color": MUTED, "width": 1},
            opacity=0.5,
            name=one["client"],
            showlegend=False,
        )
    mean = [unseen["accuracy_before"], *unseen["accuracy_after"].values()]
    figure.add_scatter(
        x=steps, y=mean, mode="lines+markers", line={"color": ACCENT, "width": 4}, name="mean"
    )
    return as_html(figure, "adaptation steps", ticks=steps)


def _progress(history: list[dict[str, Any]], *, withheld: bool) -> str:
    validated = [entry for entry in history if entry["validation"]]
    if not validated:
        return "<p>No round was validated (eval-every = 0).</p>"
    scores = [
        score
        for entry in validated
        for score in (
            entry["validation"]["accuracy_before"],
            *entry["validation"]["accuracy_after"].values(),
        )
    ]
    if all(score is None for score in scores):
        why = f" {_sentence(WITHHELD)}" if withheld else ""
        return f"<p>The validation clients report no accuracy.{why}</p>"
    rounds = [entry["round"] for entry in validated]
    figure = go.Figure()
    figure.add_scatter(
        x=rounds,
        y=[entry["validation"]["accuracy_before"] for entry in validated],
        mode="lines+markers",
        line={"color": MUTED},
        name="before",
    )
    steps = list(validated[0]["validation"]["accuracy_after"])
    colors = [SECOND, ACCENT, INK]
    for position, step in enumerate(steps):
        figure.add_scatter(
            x=rounds,
            y=[entry["validation"]["accuracy_after"][step] for entry in validated],
            mode="lines+markers",
            line={"color": colors[position % len(colors)]},
            name=f"after {step}",
        )
    return as_html(figure, "round")


def _bad_replies(results: dict[str, Any], fate: str, title: str) -> str:
    """Return the first replies of that fate with their reasons; nothing where there are none."""
    found = [
        (f"round {entry['round']}", one)
        for entry in results["history"]
        for one in entry.get(fate, [])
    ]
    found += [("unseen clients", one) for one in results["unseen"].get(fate, [])]
    if not found:
        return ""
    rows = [(f"{when}, {one['client']}", one["reason"]) for when, one in found[:REASONS]]
    more = len(found) - len(rows)
    note = f'<p class="note">And {more} more, in results.json.</p>' if more else ""
    return f"<h2>{title}</h2>\n{table_of(rows)}\n{note}"


def as_html(figure: go.Figure, x_title: str, *, ticks: list[int] | None = None) -> str:
    """Return a figure as a div, which the script in the page's head draws."""
    figure.update_layout(
        template="plotly_white",
        height=380,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"orientation": "h", "y": 1.08},
        xaxis={"title": x_title, **({"tickvals": ticks} if ticks else {})},
        yaxis={"title": "accuracy", "range": [0, 1.02], "tickformat": ".0%"},
    )
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displaylogo": False}
    )
    return html


def table_of(rows: list[tuple[str, str]]) -> str:
    """Return rows of a name and a value as an HTML table."""
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return f'<table class="figures">{cells}</table>'


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"

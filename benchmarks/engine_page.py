"""The table of the engine's benchmarks as Markdown."""

from collections.abc import Mapping
from typing import Any

TITLES = {
    "flower": "Against Flower's own engine: how many times faster a round is",
    "pfl": "Against pfl-research 0.6.0, equal processes: how many times faster a round is",
    "kernels": "One client's local step",
    "scale": "Cost of a client over clients in a round",
    "memory": "Resident memory over clients",
    "rounds": "Resident memory over rounds",
    "writers": "Memory of the command line",
    "aggregation": "Aggregation of 1000 replies",
}
HEAD = "| comparison | at least | aim | reached | least to most | | sides |"
ABOUT = (
    "Each side runs in a fresh process (kernels: all in one), the sides in turn; a figure is the "
    "median of the turns' ratios, with the least and the most. The first round of a side, with "
    "start, roll call and compilation, is left out and stands beside it. Work: small CNN on "
    "28x28 images (0.42 MB); "
    "FedAvg: five SGD steps of batch 10; MAML: FedMeta, exact, one inner step on 25 records, 25 to "
    "be judged on. One processor for each actor on both sides, Ray's workers not niced. A ratio "
    "stands only where the models of all sides agree within 1e-5 after the first round, and those "
    "of Flower's engine and ours, both eager, after the last one too. (Later rounds of pfl draw "
    "other batches, and where ReLU and max-pooling have a kink, the rounding in which kernels "
    "differ grows over the rounds.) The bars are for the compiled kernel, which a run of some "
    "length takes by itself; eager is shown beside it. The cores are those of a shared host, whose "
    "speed drifts: read the ratios rather than the seconds. Memory is proportional (PSS), driver, "
    "actors and Ray's own processes together; over rounds without the pages of files, whose share "
    "depends on who else has them open.\n\n"
    "**Why bars are missed.** Of a compiled round of 100 clients, about 70 % of the processor time "
    "is the compiled arithmetic of the clients, which Flower's side has to do as well: with it "
    "three times as fast a round is out of reach unless the arithmetic itself becomes faster. 0.2 "
    "processor seconds of a round do not depend on its clients (32 blocks through Ray and back; "
    "fewer blocks would leave less to share out on more cores), which is why 1000 clients gain "
    "more than 100, against pfl too. Tried without gain: channels-last, pooling written in five "
    "other ways, all layers as matrix products, the compiler's C++ wrapper, other allocators' "
    "thresholds, hand-written headers of messages, no garbage collection. Taken: one-channel "
    "convolutions as matrix products, guards once a client, blocks of equal size."
)


def page_of(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of ``rows`` as engine.json holds them."""
    lines = ["# What the cohort engine is worth", "", "`python benchmarks/engine.py`", "", ABOUT]
    for name, title in TITLES.items():
        if name not in rows:
            continue
        row = rows[name]
        lines += ["", f"## {title}", "", f"`--rows {name}`. {_machine(row['machine'])}", ""]
        lines += [HEAD, "|---" * 7 + "|", *map(_line, row["lines"])]
    return "\n".join(lines) + "\n"


def _line(line: Mapping[str, Any]) -> str:
    unit = f" {line['unit']}" if line["unit"] else ""
    bars = [_bar(line[key], line["upper"], unit) for key in ("bar", "aim")]
    spread = f"{_number(line['low'])} to {_number(line['high'])}"
    reached = "not measured: no GPU" if line["figure"] is None else _number(line["figure"]) + unit
    cells = [line["what"], *bars, reached, spread if line["figure"] is not None else "-"]
    return "| " + " | ".join([*cells, line["verdict"], line["note"]]) + " |"


def _bar(value: float | None, upper: bool, unit: str) -> str:
    if value is None:
        return "-"
    return f"{'at most ' if upper else ''}{_number(value)}{unit}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _machine(found: Mapping[str, Any]) -> str:
    gpu = found["gpu"] or "no GPU"
    return (
        f"{found['cores']} CPU cores ({found['processor']}), {found['memory_gb']} GB, {gpu}; "
        f"Python {found['python']}, torch {found['torch']}, flwr {found['flwr']}, ray "
        f"{found['ray']}; load at the end {found['load'][0]}."
    )

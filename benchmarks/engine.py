"""What the cohort engine is worth: rounds, kernels, memory and aggregation, against others.

    python benchmarks/engine.py --data-root DATA --pfl-python pfl-venv/bin/python
    python benchmarks/engine.py --rows flower,scale

Each side of a comparison runs in a fresh process, the sides in turn; a figure is the median of the
turns' ratios, and the first round of each side (start, compilation) is left out and told apart. The
sides' models are compared: a ratio stands only where they are equal. Rows, each of which is written
when it is done:

    flower       Flower's own engine: the same ClientApp, strategy and seeds
    pfl          pfl-research, which has a virtual environment of its own: see engine_pfl.py
    kernels      one client's local step: eager, compiled, and many clients at once
    scale        the cost of a client from 100 to 10,000 clients in a round
    memory       resident memory from 100 to 10,000 clients
    rounds       resident memory over 1,000 rounds
    writers      memory of the command line with all 539 writers of MNIST
    aggregation  1000 replies of 1 and of 10 MB

Finished jobs are kept in --work, so that a benchmark that was stopped goes on where it stood.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import engine_aggregation
import engine_kernels
import engine_rows
import engine_side
import engine_steps
import typer
from engine_page import page_of
from engine_rows import Setting
from engine_turns import Line, Turns, machine

from metabloom.config import data_folder
from metabloom.errors import unknown_name

ROWS: dict[str, Callable[[Setting], Iterator[Line]]] = {
    "flower": engine_rows.against_flower,
    "pfl": engine_rows.against_pfl,
    "kernels": engine_kernels.lines,
    "scale": engine_rows.over_clients,
    "memory": engine_rows.in_memory,
    "rounds": engine_rows.over_rounds,
    "writers": engine_rows.all_writers,
    "aggregation": engine_aggregation.lines,
}


def measure(names: list[str], setting: Setting, out: Path) -> dict[str, Any]:
    """Measure rows and write both files after each line, beside the lines that are there already.

    A line of the same comparison is replaced.
    """
    path = out / "engine.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        lines = {line["what"]: line for line in known.get(name, {"lines": []})["lines"]}
        for line in ROWS[name](setting):
            lines[line.what] = {**line.as_json(), "verdict": line.verdict}
            known[name] = {"machine": machine(), "lines": list(lines.values())}
            path.write_text(json.dumps(known, indent=1) + "\n")
            (out / "engine.md").write_text(page_of(known))
            print(f"{line.what}: {line.figure} {line.verdict}; {line.note}", flush=True)
    return known


def main(
    rows: Annotated[str, typer.Option(help="Rows, with commas.")] = ",".join(ROWS),
    data_root: Annotated[Path | None, typer.Option(help="Folder; METABLOOM_DATA, ./data.")] = None,
    pfl_python: Annotated[str, typer.Option(help="Interpreter that has pfl; empty: no row.")] = "",
    work: Annotated[
        Path, typer.Option(help="Folder for finished jobs; empty it after a change of the code.")
    ] = Path(".cache/engine"),
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("benchmarks/results"),
    turns: Annotated[int, typer.Option(help="Most turns of a comparison; 0: its own.")] = 0,
    clients: Annotated[str, typer.Option(help="Of row flower, with commas; empty: all.")] = "",
    quick: Annotated[bool, typer.Option(help="Tiny sizes in one process: only a test.")] = False,
) -> None:
    """Measure, and write engine.json and engine.md."""
    names = rows.split(",")
    for name in names:
        if name not in ROWS:
            raise unknown_name("row", name, ROWS)
    scripts = {
        "engine_side.py": engine_side,
        "engine_aggregation.py": engine_aggregation,
        "engine_steps.py": engine_steps,
    }
    here = {name: module.run_job for name, module in scripts.items()} if quick else {}
    setting = Setting(
        turns=Turns(work.resolve(), here=here),
        workers=0 if quick else 2,
        quick=quick,
        pfl_python=pfl_python,
        data_root=str((data_root or data_folder()).resolve()),
        most_turns=turns,
        clients=tuple(map(int, filter(None, clients.split(",")))),
    )
    measure(names, setting, out)


if __name__ == "__main__":
    typer.run(main)

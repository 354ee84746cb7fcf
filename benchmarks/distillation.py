"""What distillation between clients is worth: accuracy, and bytes.

    python benchmarks/distillation.py --data-root DATA
    python benchmarks/distillation.py --rows feddf,public

Rows, each line of which is written when it is done:

    feddf         FedDF with three architectures, against averaging within each
    feddf-one     FedDF with one architecture
    public        FedDF by the kind of its public records
    logits        FedMD and DS-FL, against each client alone and all data together
    bytes         DS-FL and FedKD, against FedAvg
    teacher       a federated teacher of a federated student
    meta-teacher  a meta-trained teacher on unseen clients

Each run is what ``metabloom simulate`` does with the same keys. Settings are chosen on the
validation clients of seed 0 alone; seeds 0, 1 and 2 are shown. Finished runs are kept in --work, so
that a benchmark that was stopped goes on where it stood.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import distillation_feddf
import distillation_logits
import distillation_teachers
import typer
from distillation_page import Line, Verdict, page_of
from distillation_runs import Runs
from distillation_setting import Setting

from metabloom.config import data_folder
from metabloom.errors import unknown_name

ROWS: dict[str, Callable[[Setting], Iterator[Line | Verdict]]] = {
    "feddf": distillation_feddf.several,
    "feddf-one": distillation_feddf.one,
    "public": distillation_feddf.public,
    "logits": distillation_logits.logits,
    "bytes": distillation_logits.volume,
    "teacher": distillation_teachers.teacher,
    "meta-teacher": distillation_teachers.meta_teacher,
}
ABOUT = {
    **distillation_feddf.ABOUT,
    **distillation_logits.ABOUT,
    **distillation_teachers.ABOUT,
}


def measure(names: list[str], setting: Setting, out: Path) -> dict[str, Any]:
    """Measure rows and write both files after each line, beside the lines that are there already.

    A line or a verdict of the same name is replaced.
    """
    from engine_turns import machine

    path = out / "distillation.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        row = known.get(name, {"lines": [], "verdicts": []})
        kept = {kind: {one["what"]: one for one in row[kind]} for kind in ("lines", "verdicts")}
        for made in ROWS[name](setting):
            kind = "lines" if isinstance(made, Line) else "verdicts"
            kept[kind][made.what] = made.as_json()
            known[name] = {"machine": machine()}
            known[name] |= {key: list(value.values()) for key, value in kept.items()}
            path.write_text(json.dumps(known, indent=1) + "\n")
            (out / "distillation.md").write_text(page_of(known, ABOUT))
            print(f"{name}: {made.what}: {_shown(made)}", flush=True)
    return known


def _shown(made: Line | Verdict) -> str:
    if isinstance(made, Verdict):
        return f"{_rounded(made.figures)} {made.unit} {made.said}"
    return f"{_rounded(made.accuracy)} {_rounded(made.figures)} {list(made.seconds)}"


def _rounded(columns: Any) -> dict[str, list[float]]:
    return {key: [round(value, 3) for value in values] for key, values in columns.items()}


def main(
    rows: Annotated[str, typer.Option(help="Rows, with commas.")] = ",".join(ROWS),
    data_root: Annotated[Path | None, typer.Option(help="Folder; METABLOOM_DATA, ./data.")] = None,
    work: Annotated[
        Path, typer.Option(help="Folder for finished runs; empty it after a change of the code.")
    ] = Path(".cache/distillation"),
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("benchmarks/results"),
    workers: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
    quick: Annotated[bool, typer.Option(help="Tiny sizes in one process: only a test.")] = False,
) -> None:
    """Measure, and write distillation.json and distillation.md."""
    names = rows.split(",")
    for name in names:
        if name not in ROWS:
            raise unknown_name("row", name, ROWS)
    os.environ["OMP_NUM_THREADS"] = "1"
    root = str((data_root or data_folder()).resolve())
    runs = Runs(work.resolve(), root, 0 if quick else workers)
    setting = Setting(runs, seeds=(0,), quick=True) if quick else Setting(runs)
    try:
        measure(names, setting, out)
    finally:
        runs.close()


if __name__ == "__main__":
    typer.run(main)

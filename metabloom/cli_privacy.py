"""The command line of privacy: ``metabloom privacy plan``, ``show`` and ``audit``."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from .errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from .accounting import Accountant, Budget, Event
    from .ledger import Entry, PrivacyLedger
    from .planning import Plan

app = typer.Typer(help="Plan, read and audit differential privacy.", no_args_is_help=True)
console = Console()

ROWS = 20  # of a ledger's spending that are shown
MOST_MORE = 2**30  # reservations that are counted ahead
SEEDED = (
    "WARNING: {count} of its reservations were seeded. Seeded noise can be computed again by who "
    "knows the seed: it protects nobody. Seeds are for tests only."
)
Delta = Annotated[float, typer.Option(help="Delta, well below 1 / records of a client.")]
AccountantName = Annotated[str, typer.Option("--accountant", help="rdp or prv.")]


# -- plan ------------------------------------------------------------------------------------------


@app.command("plan")
def plan_noise(
    epsilon: Annotated[float, typer.Option(help="Target epsilon of each client.")],
    rounds: Annotated[int, typer.Option(help="Rounds in which one client takes part.")],
    delta: Delta = 1e-5,
    inner_steps: Annotated[int, typer.Option(help="Inner steps of a meta-step (K).")] = 1,
    sample_rate: Annotated[float, typer.Option(help="Chance of a record to be drawn (q).")] = 0.1,
    method: Annotated[
        str, typer.Option(help="fomaml, reptile, dp-sgd, meta-sgd or second-order.")
    ] = "fomaml",
    local_steps: Annotated[int, typer.Option(help="Steps or meta-steps of a round.")] = 1,
    hvp_noise: Annotated[
        float, typer.Option(help="Second order: noise of Hessian products over that of gradients.")
    ] = 1.0,
    accountant: AccountantName = "rdp",
    records: Annotated[
        int | None, typer.Option(help="Records of the largest client, to check delta.")
    ] = None,
    parameters: Annotated[
        int | None, typer.Option(help="Second order: parameters of the model.")
    ] = None,
    batch_size: Annotated[
        float | None, typer.Option(help="Second order: expected batch size.")
    ] = None,
    inner_lr: Annotated[float | None, typer.Option(help="Second order: inner-lr.")] = None,
    hvp_max_norm: Annotated[float, typer.Option(help="Second order: privacy.hvp-max-norm.")] = 0.1,
) -> None:
    """Say how much noise keeps a client within epsilon, and what other choices would cost."""
    from .planning import NOISY, noise_to_signal, plan

    if records is not None and records < 1:
        raise ConfigError(f"--records {records}: must be a whole number of at least 1")
    sizes = {"--parameters": parameters, "--batch-size": batch_size, "--inner-lr": inner_lr}
    missing = [name for name, value in sizes.items() if value is None]
    if len(missing) < len(sizes) and (missing or method != "second-order"):
        raise ConfigError(
            f"{', '.join(sizes)} belong together, with --method second-order: they give the noise "
            f"of its Hessian products; missing: {', '.join(missing) or '--method second-order'}"
        )
    made = plan(
        epsilon=epsilon,
        delta=delta,
        rounds=rounds,
        method=method,
        inner_steps=inner_steps,
        local_steps=local_steps,
        sample_rate=sample_rate,
        hvp_ratio=hvp_noise,
        accountant=cast("Accountant", accountant),
    )
    _print_plan(made)
    if records is not None and delta >= 1 / records:
        _say(
            f"WARNING: delta = {delta:g} is not below 1 / records = {1 / records:.2g}: with such a "
            "delta a mechanism may publish a whole record",
            style="bold red",
        )
    if parameters is None or batch_size is None or inner_lr is None:
        return
    ratio = noise_to_signal(
        inner_lr=inner_lr,
        hvp_noise=made.schedule.hvp_noise(made.noise_multiplier),
        hvp_max_norm=hvp_max_norm,
        num_parameters=parameters,
        batch_size=batch_size,
    )
    _say(f"noise of a Hessian product over its direction: {ratio:.3g}")
    if ratio > NOISY:
        _say(
            f"WARNING: above {NOISY:g} the second-order term is mostly noise: take fomaml, a lower "
            "inner-lr or --hvp-max-norm, a larger batch or a smaller model",
            style="bold red",
        )


def _print_plan(made: "Plan") -> None:
    from .planning import at_most

    schedule, budget = made.schedule, made.budget
    of_round = schedule.releases // schedule.rounds
    _say(f"noise multiplier: {made.noise_multiplier:g}", style="bold")
    _say(" ".join(f"--set {key}={value}" for key, value in made.settings.items()))
    _say(
        f"epsilon at delta {budget.delta:g}: at most {at_most(made.epsilon_rdp)} by RDP, "
        f"{at_most(made.epsilon_prv)} by PRV"
    )
    _say(
        f"{schedule.releases} releases: {schedule.rounds} rounds of {of_round}. That is for a "
        "client that takes part in each of them; nothing is gained from the server's choice of "
        "clients"
    )
    _say(
        "set privacy.expected-batch-size too: sample-rate times a usual number of records that is "
        "known to all"
    )
    table = Table(
        Column("choice", no_wrap=True),
        _number("releases"),
        _number(f"noise multiplier for epsilon {budget.epsilon:g}"),
        _number(f"epsilon at noise multiplier {made.noise_multiplier:g}"),
        title="What other choices would cost, by RDP",
    )
    for one in made.alternatives:
        noise = one.noise_multiplier
        told = "-" if noise is None else f"{noise:.4f}"
        table.add_row(one.change, str(one.schedule.releases), told, at_most(one.epsilon))
    console.print(table)


# -- show ------------------------------------------------------------------------------------------


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A ledger (.jsonl), or a folder of ledgers.")],
    delta: Delta = 1e-5,
    target_epsilon: Annotated[
        float | None, typer.Option(help="Say what remains to this epsilon.")
    ] = None,
    accountant: AccountantName = "rdp",
) -> None:
    """Show what was spent on a client's data, over all rounds, runs and servers."""
    from .accounting import Budget

    kind = cast("Accountant", accountant)
    checked = Budget(1.0 if target_epsilon is None else target_epsilon, delta, kind)
    budget = None if target_epsilon is None else checked
    if not _is_there(path):
        raise ConfigError(f"there is no privacy ledger {str(path)!r}: check the path")
    if path.is_dir():
        _show_folder(path, delta, kind, budget)
    else:
        _show_one(path, delta, kind, budget)


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as err:
        raise ConfigError(f"the privacy ledger {str(path)!r} cannot be read: {err}") from err
    return True


def _show_one(path: Path, delta: float, accountant: "Accountant", budget: "Budget | None") -> None:
    from .accounting import epsilon_of
    from .ledger import PrivacyLedger
    from .planning import at_most

    ledger = PrivacyLedger(path)
    entries = ledger.entries()
    opened = _opening(path)
    _say(f"ledger: {path}", style="bold")
    _say(f"data: {opened.get('data') or 'not named'}")
    _say(f"protects: {opened.get('unit') or 'nothing yet'}")
    _say(f"reservations: {len(entries)}")
    if seeded := sum(entry.seeded for entry in entries):
        _say(SEEDED.format(count=seeded), "bold red")
    if entries:
        console.print(_spending(entries, delta))
        console.print(_mechanisms(entries, delta, accountant))
    spent = _events_of(entries)
    by = {"RDP": epsilon_of(spent, delta, "rdp")}
    if accountant == "prv":
        by["PRV"] = epsilon_of(spent, delta, "prv")
    told = ", ".join(f"{at_most(epsilon)} by {name}" for name, epsilon in by.items())
    _say(f"epsilon at delta {delta:g}: at most {told}", style="bold")
    if budget is not None:
        _say(_what_remains(ledger, entries, budget, min(by.values())))


def _spending(entries: Sequence["Entry"], delta: float) -> Table:
    """Return the table of what the ledger had come to after reservations that are evenly chosen."""
    from .accounting import Event, epsilon_of
    from .planning import at_most

    time, mechanism = Column("time (UTC)", no_wrap=True), Column("mechanism", no_wrap=True)
    table = Table(_number("no."), time, "run", _number("round"), mechanism, title="Spent, by RDP")
    table.add_column("releases", justify="right")
    table.add_column("epsilon so far", justify="right")
    shown = _evenly(len(entries))
    counts: Counter[tuple[float, float]] = Counter()
    for index, entry in enumerate(entries):
        for sigma, rate, count in entry.events:
            counts[sigma, rate] += count
        if index in shown:
            so_far = [Event(*key, count) for key, count in counts.items()]
            table.add_row(
                str(index + 1),
                Text(entry.time[:16].replace("T", " ")),
                Text(entry.run[:8] or "-"),
                str(entry.server_round or "-"),
                Text(entry.mechanism or "-"),
                str(counts.total()),
                at_most(epsilon_of(so_far, delta, "rdp")),
            )
    return table


def _mechanisms(entries: Sequence["Entry"], delta: float, accountant: "Accountant") -> Table:
    from .accounting import epsilon_of
    from .planning import at_most

    table = Table(
        *("mechanism", "noise multiplier, sample rate"),
        _number("releases"),
        _number("epsilon alone"),
        title=f"Mechanisms by {accountant.upper()}",
    )
    for name in dict.fromkeys(entry.mechanism for entry in entries):
        events = _events_of(entry for entry in entries if entry.mechanism == name)
        table.add_row(
            Text(name or "-"),
            "; ".join(f"{sigma:g}, {rate:g}" for sigma, rate, _ in events),
            str(sum(count for _, _, count in events)),
            at_most(epsilon_of(events, delta, accountant)),
        )
    return table


def _what_remains(
    ledger: "PrivacyLedger", entries: Sequence["Entry"], budget: "Budget", spent: float
) -> str:
    target = f"target {budget.epsilon:g} by {budget.accountant.upper()}"
    if not entries:
        return f"{target}: all of it remains"
    last, left = entries[-1].events, max(0.0, budget.epsilon - spent)
    more = _more(ledger, last, budget)
    like = f"like the last one ({sum(event.count for event in last)} releases)"
    count = f"more than {MOST_MORE}" if more >= MOST_MORE else str(more)
    fate = f"{count} more reservation{'' if more == 1 else 's'} {like}"
    return f"{target}: {left:.3g} remains, {fate if more else f'exhausted: not one more {like}'}"


def _more(ledger: "PrivacyLedger", events: Sequence["Event"], budget: "Budget") -> int:
    """Return how many more reservations of ``events`` the budget admits, at most ``MOST_MORE``."""

    def admits(times: int) -> bool:
        repeated = [event._replace(count=event.count * times) for event in events]
        return ledger.admits(repeated, budget)

    low, high = 0, 1  # admitted; perhaps not
    while admits(high):
        low, high = high, 2 * high
        if low >= MOST_MORE:
            return MOST_MORE
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if admits(middle) else (low, middle)
    return low


def _show_folder(
    folder: Path, delta: float, accountant: "Accountant", budget: "Budget | None"
) -> None:
    from .accounting import epsilon_of
    from .ledger import PrivacyLedger
    from .planning import at_most

    paths = sorted(path for path in folder.rglob("*.jsonl") if path.is_file())
    if not paths:
        raise ConfigError(f"no privacy ledger (*.jsonl) lies in {str(folder)!r}: check the path")
    file = Column("ledger", overflow="fold")
    heads = (file, "data", _number("reservations"), _number("epsilon"), "note")
    table = Table(*heads, title=f"Ledgers, at delta {delta:g} by {accountant.upper()}")
    spent, damaged, exhausted, seeded = [], [], 0, 0
    for path in paths:
        name = Text(str(path.relative_to(folder)))
        ledger = PrivacyLedger(path)
        try:
            entries = ledger.entries()
        except LedgerError as err:
            damaged.append(err)
            table.add_row(name, "-", "-", "-", "damaged")
            continue
        notes = []
        spent.append(epsilon_of(_events_of(entries), delta, accountant))
        if any(entry.seeded for entry in entries):
            seeded += 1
            notes.append("SEEDED: protects nobody")
        if budget and entries and not ledger.admits(entries[-1].events, budget):
            exhausted += 1
            notes.append("exhausted")
        data = Text(str(_opening(path).get("data") or "-"))
        table.add_row(name, data, str(len(entries)), at_most(spent[-1]), ", ".join(notes))
    console.print(table)
    if spent:
        told = f"epsilon at most {at_most(max(spent))}, median {at_most(median(spent))}"
        _say(f"{len(spent)} ledgers: {told}")
    if budget:
        _say(f"{exhausted} exhausted (target {budget.epsilon:g})")
    if seeded:
        _say(f"WARNING: {seeded} ledgers hold seeded noise, which protects nobody", "bold red")
    if damaged:
        more = f" (and {len(damaged) - 1} more are damaged)" if len(damaged) > 1 else ""
        raise LedgerError(f"{damaged[0]}{more}")


def _opening(path: Path) -> dict[str, Any]:
    """Return the first line of a ledger that was checked; empty where it has none."""
    from .files import unseal_json

    first, end, _ = path.read_bytes().partition(b"\n")
    return unseal_json(first + end) if end else {}


def _events_of(entries: Iterable["Entry"]) -> list["Event"]:
    from .accounting import aggregated

    return aggregated(event for entry in entries for event in entry.events)


def _evenly(count: int) -> set[int]:
    """Return at most ``ROWS`` of the indices below ``count``, the first and the last among them."""
    if count <= ROWS:
        return set(range(count))
    return {round(place * (count - 1) / (ROWS - 1)) for place in range(ROWS)}


# -- audit -----------------------------------------------------------------------------------------


@app.command()
def audit(
    seed: Annotated[int, typer.Option(help="Seed of which planted records are present.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="One check by name; repeatable.")] = None,
) -> None:
    """Attack the private clients of this installation, and hold them to what they claim."""
    from .clients.privacy.audit import run_audit

    findings = run_audit(seed=seed, only=tuple(only or ()))
    table = Table("check", "what", _number("measured"), _number("claimed"), "verdict")
    for one in findings:
        verdict = Text("kept", "green") if one.is_ok else Text("FAILED", "bold red")
        is_within = one.bound_kind == "within"
        claim = (
            f"{one.claimed:.4g} ± {one.tolerance:.2g}"
            if is_within
            else f"at most {one.claimed:.4g}"
        )
        what = Text(f"{one.what}, {one.unit}")
        table.add_row(Text(one.check), what, f"{one.measured:.4g}", claim, verdict)
    console.print(table)
    if not findings:
        raise ConfigError("the audit made no check: name one that there is with --only")
    if failed := [one for one in findings if not one.is_ok]:
        names = ", ".join(dict.fromkeys(one.check for one in failed))
        _say(
            f"{len(failed)} of {len(findings)} comparisons failed ({names}): less is protected "
            "than is claimed; do not train on private data with this installation",
            style="bold red",
        )
        raise typer.Exit(1)
    _say(f"{len(findings)} comparisons: what is claimed is kept, as far as they can tell")


def _number(head: str) -> Column:
    return Column(head, justify="right")


def _say(text: str, style: str = "") -> None:
    # Text: brackets and :names: in a path are the user's own, not markup.
    console.print(Text(text, style=style), soft_wrap=True)

"""SuperNodes that pin their privacy: what they book, what they refuse, and what they say of it.

Deployed by deploy/local.sh, with the pins in $METABLOOM_PRIVACY.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from flwr.common.config import parse_config_args

from metabloom.accounting import Event, epsilon_of
from metabloom.clients import PrivacyConfig, PrivacyLedger
from metabloom.config import RunConfig
from metabloom.errors import BUDGET_EXHAUSTED, PrivacyError
from metabloom.pins import KEYS as PRIVACY_KEYS
from metabloom.pins import ROOT as PRIVACY_ROOT
from metabloom.pins import privacy_of
from metabloom.sim import load_federation
from tests.deploy.loopback import DEPLOY, Loopback, loopback, needs_tools

NODES = 4
SIGMA, RATE, DELTA = 4.0, 0.1, 1e-5
EVENTS_A_ROUND = 2  # FOMAML with one inner step: K + 1
PINS = (
    f"privacy.noise-multiplier={SIGMA} privacy.sample-rate={RATE} "
    f"privacy.expected-batch-size=30 privacy.target-epsilon=8.0 privacy.target-delta={DELTA}"
)
RUN_S = 300.0  # about 25 s on two quiet cores
FAILED = "a private client failed; the reason is in its own log"


# --- the pins, from the templates to the client ---------------------------------------------------


def node_configs() -> dict[str, str]:
    """Return the node config of each template, with its variables filled in."""
    script = (DEPLOY / "local.sh").read_text(encoding="utf-8").replace("\\\n", "")
    unit = (DEPLOY / "systemd" / "metabloom-supernode@.service").read_text(encoding="utf-8")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    (service,) = [
        text for text in compose["services"]["supernode"]["command"] if "--node-config" in text
    ]
    quoted = r'--node-config "(.*)"'
    texts = {
        "local.sh": re.search(quoted, script)[1],
        "systemd": re.search(quoted, unit.replace("\\\n", " "))[1],
        "compose": service.removeprefix("--node-config="),
    }
    return {name: filled(text) for name, text in texts.items()}


def filled(text: str) -> str:
    text = re.sub(r"\$\{(METABLOOM_)?PRIVACY(:-)?\}", PINS, text)
    text = re.sub(r"\$\{\w+:-(\d+)\}|\$\(\(.*?\)\)|\$\{[A-Z_]+\}|\$count", "1", text)
    return text.replace("$folder", "/node").replace("%S", "/var/lib").replace("%i", "node")


def private_under(node: dict[str, object], run: dict[str, object]) -> PrivacyConfig | None:
    """Return the parameters of a client on a node with this config, in a run with that one."""
    return privacy_of(node, RunConfig.read(run), "client-000")


@pytest.mark.parametrize("template", ["local.sh", "systemd", "compose"])
def test_a_template_hands_the_pins_and_a_place_for_the_ledger_to_the_client(template: str):
    node = parse_config_args([node_configs()[template]])
    assert not any("$" in str(value) or "%" in str(value) for value in node.values())
    pinned = {key for key in node if key.startswith("privacy.")}
    assert pinned <= PRIVACY_KEYS
    assert pinned == set(parse_config_args([PINS])) | {PRIVACY_ROOT}
    privacy = private_under(node, {})  # a run that says nothing of privacy
    assert privacy is not None
    assert (privacy.noise_multiplier, privacy.sample_rate) == (SIGMA, RATE)
    assert (privacy.expected_batch_size, privacy.target_epsilon) == (30.0, 8.0)
    ledger = PrivacyLedger(str(node[PRIVACY_ROOT])).path / f"partition-{node['partition-id']}.jsonl"
    assert privacy.ledger.path == ledger


@pytest.mark.parametrize("template", ["local.sh", "systemd", "compose"])
def test_a_template_without_pins_leaves_privacy_to_the_run_but_not_the_place(template: str):
    node = parse_config_args([node_configs()[template].replace(PINS, "")])
    assert {key for key in node if key.startswith("privacy.")} == {PRIVACY_ROOT}
    assert private_under(node, {}) is None
    wish = {"privacy.noise-multiplier": 1.0, PRIVACY_ROOT: "/of/the/server"}
    privacy = private_under(node, wish)
    assert privacy.noise_multiplier == 1.0
    assert privacy.ledger.path.is_relative_to(str(node[PRIVACY_ROOT]))


@pytest.mark.parametrize(
    ("key", "weaker", "stronger"),
    [
        ("privacy.noise-multiplier", 1.0, 5.0),
        ("privacy.sample-rate", 0.5, 0.05),
        ("privacy.target-epsilon", 80.0, 1.0),
        ("privacy.target-delta", 1e-2, 1e-6),
        ("privacy.max-grad-norm", 10.0, 0.5),
        ("privacy.hvp-max-norm", 1.0, 0.05),
    ],
)
def test_a_run_may_ask_a_pinned_node_for_more_privacy_and_not_for_less(
    key: str, weaker: float, stronger: float
):
    node = parse_config_args([node_configs()["systemd"]])
    run = {"privacy.noise-multiplier": SIGMA}
    field = key.removeprefix("privacy.").replace("-", "_")
    assert getattr(private_under(node, {**run, key: stronger}), field) == stronger
    with pytest.raises(PrivacyError, match=rf"the server wishes {key} = .*has pinned"):
        private_under(node, {**run, key: weaker})


# --- the same through a SuperLink, with a SuperNode that is killed --------------------------------


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with loopback(tmp_path_factory.mktemp("private")) as started:
        started.environment["METABLOOM_PRIVACY"] = PINS
        started.script("up", str(NODES))
        yield started


def training_nodes() -> dict[str, str]:
    """Return the SuperNodes that train, and their clients."""
    federation = load_federation("digits", seed=0, num_clients=NODES)
    numbered = enumerate(zip(federation.client_ids, federation.roles, strict=True), 1)
    return {f"node-{i}": client for i, (client, role) in numbered if role == "train"}


def run_of(deployment: Loopback, name: str, *keys: str, rounds: int = 1) -> tuple[int, dict, str]:
    """Return the exit status of a run, its results and its log."""
    out = deployment.folder / "results" / name
    usual = ["eval-every=0", "eval-steps=1", "clients-per-round=4", f"out='{out}'"]
    run, log = deployment.start_run(f"rounds={rounds}", *usual, *keys)
    deployment.until(f"run '{name}' ends", lambda: run.poll() is not None, RUN_S)
    said = log.read_text(errors="replace")
    file = out / "results.json"
    assert file.exists() or run.returncode, f"{said}\n{deployment.logs()}"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return run.returncode, results, said


def ledger_files(deployment: Loopback) -> dict[str, Path]:
    """Return the ledgers of all SuperNodes, by SuperNode; no SuperNode has more than one."""
    files = sorted(deployment.folder.glob("**/*.jsonl"))
    found = {file.relative_to(deployment.folder).parts[0]: file for file in files}
    assert len(found) == len(files)
    return found


def rounds_booked(deployment: Loopback) -> int:
    """Return how many rounds every training SuperNode has booked so far."""
    files = ledger_files(deployment).values()
    (rounds,) = {len(PrivacyLedger(file).entries()) for file in files}
    return rounds


def check_booked(deployment: Loopback, rounds: int) -> None:
    """Assert that every training SuperNode booked so many rounds, at its pins, and no other any."""
    files = ledger_files(deployment)
    assert list(files) == list(training_nodes())
    for node in training_nodes():
        data = f"partition-{int(node.removeprefix('node-')) - 1}"  # whatever a run calls the data
        assert files[node] == deployment.folder / node / "ledgers" / f"{data}.jsonl"
        ledger = PrivacyLedger(files[node], data=data)
        assert ledger.events == [(SIGMA, RATE, EVENTS_A_ROUND * rounds)], node
        assert files[node].stat().st_mode & 0o777 == 0o600
        assert files[node].stat().st_uid == os.getuid()
        assert files[node].parent.stat().st_mode & 0o077 == 0, "of the owner alone"


def epsilon_after(rounds: int) -> float:
    return epsilon_of([Event(SIGMA, RATE, EVENTS_A_ROUND * rounds)], DELTA)


@pytest.fixture(scope="module")
def first_run(deployment: Loopback) -> tuple[int, dict, str]:
    return run_of(deployment, "first", rounds=2)


def failures_of(results: dict) -> list[tuple[str, str]]:
    told = [one for entry in results["history"] for one in entry["failures"]]
    return [(one["client"], one["reason"]) for one in told]


@pytest.mark.e2e
@needs_tools
def test_a_run_without_privacy_keys_trains_privately_on_pinned_nodes(
    deployment: Loopback, first_run: tuple[int, dict, str]
):
    status, results, said = first_run
    assert (status, results["failures"], results["quarantined"]) == (0, 0, 0), said
    check_booked(deployment, 2)
    told = results["privacy"]["record_level"]
    assert told["epsilon_max"] == pytest.approx(epsilon_after(2), rel=1e-12)
    assert told["clients"] == len(training_nodes())
    (score,) = results["unseen"]["per_client"]
    assert set(score) <= {"client", "num_examples"}, "no metric was declared unprotected"
    assert score["num_examples"] == 1


@pytest.mark.e2e
@needs_tools
@pytest.mark.usefixtures("first_run")
def test_a_run_with_a_weaker_sigma_is_refused_with_the_reason_and_books_nothing(
    deployment: Loopback,
):
    before = {node: file.read_bytes() for node, file in ledger_files(deployment).items()}
    weak = ["privacy.noise-multiplier=1.0", "privacy.root='/tmp/of-the-server'"]
    status, results, said = run_of(deployment, "weak", *weak)
    assert status != 0, said
    assert not results, "no node took part, so there was no round"
    assert "the server wishes privacy.noise-multiplier = 1" in said
    assert "this client has pinned 4: a lower one would protect less" in said
    assert before == {node: file.read_bytes() for node, file in ledger_files(deployment).items()}


@pytest.mark.e2e
@needs_tools
@pytest.mark.usefixtures("first_run")
def test_a_killed_supernode_goes_on_from_its_ledger(deployment: Loopback):
    before = rounds_booked(deployment)
    assert before >= 2
    victim, _ = training_nodes()
    deployment.kill(victim)
    assert f"{victim} is connected" in deployment.script("up", str(NODES))
    status, results, said = run_of(deployment, "second", rounds=2)
    assert (status, results["failures"], results["quarantined"]) == (0, 0, 0), said
    check_booked(deployment, before + 2)
    told = results["privacy"]["record_level"]
    assert told["epsilon_max"] == pytest.approx(epsilon_after(before + 2), rel=1e-12)
    assert told["epsilon_median"] == pytest.approx(epsilon_after(before + 2), rel=1e-12)
    assert told["epsilon_max"] > epsilon_after(2)  # of this run alone
    for file in ledger_files(deployment).values():
        *_, earlier, one, two = PrivacyLedger(file).entries()
        assert (one.server_round, two.server_round) == (1, 2)
        assert earlier.run != one.run == two.run


@pytest.mark.e2e
@needs_tools
@pytest.mark.usefixtures("first_run")
def test_spent_budgets_are_counted_as_such_and_not_as_failures(deployment: Loopback):
    before = rounds_booked(deployment)
    tight = (epsilon_after(before) + epsilon_after(before + 1)) / 2
    keys = [f"privacy.noise-multiplier={SIGMA}", f"privacy.target-epsilon={tight}"]
    status, results, said = run_of(deployment, "tight", *keys)
    assert status != 0  # nobody was left to train
    assert results["failures"] == results["quarantined"] == 0
    assert results["privacy"]["record_level"]["exhausted"] == len(training_nodes())
    assert sorted(results["history"][0]["exhausted"]) == list(training_nodes().values())
    assert BUDGET_EXHAUSTED in said
    check_booked(deployment, before)


@pytest.mark.e2e
@needs_tools
@pytest.mark.usefixtures("first_run")
def test_a_failure_of_a_private_client_reaches_the_server_as_a_constant(deployment: Loopback):
    before = rounds_booked(deployment)
    victim, other = training_nodes()
    file = ledger_files(deployment)[victim]
    honest = file.read_bytes()
    *lines, last = honest.splitlines(keepends=True)
    file.write_bytes(b"".join(lines) + last.replace(b"fomaml", b"Fomaml"))
    status, results, said = run_of(deployment, "fault")
    assert status == 0, said
    ((client, reason),) = failures_of(results)
    assert client == training_nodes()[victim]
    assert re.fullmatch(rf"<class '[\w.]+\.PrivacyError'>:<'{FAILED}'>", reason), reason
    for text in ("was altered", "LedgerError", file.name, "restore"):
        assert text not in json.dumps(results), "not even its kind is told"
        assert text not in said
    assert "was altered" in deployment.said(victim), "its own log tells"
    events = PrivacyLedger(ledger_files(deployment)[other]).events
    assert events == [(SIGMA, RATE, EVENTS_A_ROUND * (before + 1))]
    file.write_bytes(honest)

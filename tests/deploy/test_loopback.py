"""A deployment for real: TLS, authentication, processes that are killed, a run that goes on.

Everything is started and stopped by deploy/local.sh, as docs/production.md tells users to.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from metabloom.sim import load_federation
from tests.deploy.loopback import DEPLOY, Loopback, loopback, needs_tools

pytestmark = needs_tools

NODES = 4  # of 4 clients 2 train: one goes on where the other is killed
ROUNDS = 3
NGINX_PORT, STRANGERS_PORT = 10, 11  # counted from the deployment's own
START_S = 120.0  # a message is answered within about 10 s, on two busy cores within 30 s
LOST_S = 120.0  # Flower says after about 50 s that a SuperNode has gone
TRAINS = "Receiving: train message"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with loopback(tmp_path_factory.mktemp("deploy")) as started:
        started.script("up", str(NODES))
        yield started


def supernode(deployment: Loopback, *arguments: str) -> list[str]:
    return ["flower-supernode", *arguments, "--port", str(deployment.port + STRANGERS_PORT)]


def refusal(deployment: Loopback, *arguments: str) -> str:
    """Return what a SuperNode says that is refused: it ends by itself, with an error."""
    command = supernode(deployment, "--superlink", deployment.address, *arguments)
    status, said = deployment.command(*command, timeout_s=60)
    assert status != 0, said
    assert "SuperNode ID" not in said
    return " ".join(said.split())


def secrets(deployment: Loopback, folder: Path, *arguments: str) -> None:
    deployment.environment["METABLOOM_SECRETS"] = str(folder)
    status, said = deployment.command(str(DEPLOY / "secrets.sh"), *arguments, timeout_s=30)
    assert status == 0, said


def test_the_processes_cannot_import_our_package(deployment: Loopback):
    imports = "import flwr, torch, metabloom"
    status, said = deployment.command("python", "-c", imports, timeout_s=60)
    assert (status, "No module named 'metabloom'" in said) == (1, True), said


def test_a_supernode_that_is_not_registered_is_refused(deployment: Loopback, tmp_path: Path):
    secrets(deployment, tmp_path, "keys", "stranger")
    known_ca = ["--root-certificates", str(deployment.folder / "secrets" / "ca.crt")]
    key = ["--auth-supernode-private-key", str(tmp_path / "stranger")]
    assert "Failed to activate SuperNode" in refusal(deployment, *known_ca, *key)
    assert "must be registered via the CLI" in refusal(deployment, *known_ca)  # without any key


def test_a_supernode_with_another_ca_refuses_the_superlink(deployment: Loopback, tmp_path: Path):
    secrets(deployment, tmp_path, "certificates")
    other_ca = ["--root-certificates", str(tmp_path / "ca.crt")]
    key = ["--auth-supernode-private-key", str(deployment.folder / "secrets" / "node-1")]
    assert "certificate verify failed" in refusal(deployment, *other_ca, *key)


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not here")
def test_nginx_lets_a_supernode_through_and_no_user(deployment: Loopback, tmp_path: Path):
    own, front = deployment.folder / "secrets", f"localhost:{deployment.port + NGINX_PORT}"
    site = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    for old, new in (
        ("listen 9443", f"listen 127.0.0.1:{deployment.port + NGINX_PORT}"),
        ("127.0.0.1:9444", deployment.address),
        ("/etc/metabloom", str(own)),
    ):
        assert old in site
        site = site.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in kinds)
    config = tmp_path / "nginx.conf"
    config.write_text(f"events {{}}\nhttp {{\naccess_log off;\n{folders}{site}}}\n")
    settings = f"daemon off; pid {tmp_path}/pid; error_log stderr;"
    nginx = ["nginx", "-e", "stderr", "-c", str(config), "-g", settings]
    deployment.script("flwr", "supernode", "register", key_pair(deployment, tmp_path))
    ca = ["--root-certificates", str(own / "ca.crt")]
    key = ["--auth-supernode-private-key", str(tmp_path / "guest")]
    with deployment.process("nginx", nginx):
        guest = supernode(deployment, "--superlink", front, *ca, *key)
        with deployment.process("guest", guest) as log:
            deployment.until(
                "a SuperNode came through nginx", lambda: "SuperNode ID" in log.read_text(), 60
            )
        user = tmp_path / "user"
        user.mkdir()
        told = f'[superlink.front]\naddress = "{front}"\nroot-certificates = "{own}/ca.crt"\n'
        (user / "config.toml").write_text(told)
        listing = ["env", f"FLWR_HOME={user}", "flwr", "list", "front"]
        status, said = deployment.command(*listing, timeout_s=60)
        assert (status, "403 Forbidden" in said) == (1, True), said


def key_pair(deployment: Loopback, folder: Path) -> str:
    secrets(deployment, folder, "keys", "guest")
    return str(folder / "guest.pub")


def test_up_changes_nothing_where_everything_runs(deployment: Loopback):
    before = deployment.processes()
    assert "is connected" not in deployment.script("up", str(NODES))
    assert deployment.processes() == before


def test_a_run_survives_a_killed_supernode_and_goes_on_after_a_killed_superlink(
    deployment: Loopback,
):
    roles = load_federation("digits", seed=0, num_clients=NODES).roles
    victim, other = [f"node-{i}" for i, role in enumerate(roles, 1) if role == "train"]
    results = deployment.folder / "results"
    keys = ["strategy='ditto'", f"rounds={ROUNDS}", "eval-every=0", "eval-steps=1"]
    keys += ["clients-per-round=2"]

    run, _ = deployment.start_run(*keys)
    deployment.until(f"{victim} trains", lambda: TRAINS in deployment.said(victim), START_S)
    deployment.kill(victim)
    first = results / "checkpoints" / "round-00000001.json"
    deployment.until("round 1 ends without it", first.exists, LOST_S)
    assert f"{victim} is connected" in deployment.script("up", str(NODES))

    def second_round() -> bool:
        return deployment.said(other).count(TRAINS) == 2

    deployment.until(f"{other} trains in round 2", second_round, START_S)
    deployment.kill("superlink")
    assert run.wait(timeout=60) != 0
    assert not first.with_name("round-00000002.json").exists()
    assert "superlink listens" in deployment.script("up", str(NODES))

    run, log = deployment.start_run(*keys)
    deployment.until("the second run ends", lambda: run.poll() is not None, 2 * START_S)
    said = log.read_text(errors="replace")
    assert run.returncode == 0, f"{said}\n{deployment.logs()}"
    assert f"resumed after round 1 of {ROUNDS}" in said
    told = json.loads((results / "results.json").read_text(encoding="utf-8"))
    lost, *whole = told["history"]
    assert len(lost["clients"]) == 2
    (failure,) = lost["failures"]
    assert "Node Unavailable" in failure["reason"]
    assert [(entry["round"], len(entry["clients"]), entry["failures"]) for entry in whole] == [
        (number, 2, []) for number in range(2, ROUNDS + 1)
    ]
    assert len(told["unseen"]["per_client"]) == 1

    def both_runs_ended() -> bool:
        runs = json.loads(deployment.script("flwr", "list", "--format", "json"))["runs"]
        return [one["status"] for one in runs] == ["finished:completed", "finished:failed"]

    deployment.until("flwr list knows how both runs ended", both_runs_ended, LOST_S)
    for name in ("superlink", victim, other):
        assert list((deployment.folder / name / "flwr" / "apps").glob("metabloom.*"))
    # Each SuperNode keeps its own client's personal model, in the folder of its node config.
    for name in (victim, other):
        newest = f"round-{ROUNDS:08d}.safetensors"
        assert len(list((deployment.folder / name / "state").glob(f"*/*/*/{newest}"))) == 1


def test_a_run_that_fails_is_told_by_the_exit_status(deployment: Loopback):
    run, log = deployment.start_run("model='nonsense'", "resume=false")
    deployment.until("the run ends", lambda: run.poll() is not None, START_S)
    assert run.returncode == 1
    assert "did not complete" in log.read_text(errors="replace")


@pytest.mark.e2e
def test_up_waits_until_a_killed_supernode_may_come_back(deployment: Loopback):
    deployment.kill("node-1")
    said = deployment.script("up", str(NODES))
    assert "again in 75 s" in said
    assert "node-1 is connected" in said


def test_down_leaves_no_process_behind(deployment: Loopback):
    said = deployment.script("down")
    stopped = [*(f"node-{i}" for i in range(1, NODES + 1)), "superlink"]
    assert re.findall(r"(\S+) has stopped", said) == stopped
    assert deployment.processes() == {}

"""The templates for real hosts, and the page about them, agree with Flower and with each other."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode
from hatchling.builders.sdist import SdistBuilder
from packaging.requirements import Requirement

from metabloom.config import RunConfig
from tests.deploy.loopback import DEPLOY, REPOSITORY

PAGE = (REPOSITORY / "docs" / "production.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
GRID_POLLS_S = 3.0


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def known_flags(command: str) -> set[str]:
    parsers = {
        "flower-superlink": _parse_args_run_superlink,
        "flower-supernode": _parse_args_run_supernode,
    }
    return set(parsers[command]()._option_string_actions)


def start_of(unit: Path) -> str:
    """Return the command that a unit starts, on one line."""
    joined = unit.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.search(r"^ExecStart=(.*)$", joined, flags=re.MULTILINE)[1]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_names_flags_that_flower_knows(unit: Path):
    command = start_of(unit)
    name = re.search(r"/(flower-\w+)", command)[1]
    assert flags(command) >= {"--port"}
    assert flags(command) <= known_flags(name)


@pytest.mark.parametrize("name", ["superlink", "supernode"])
def test_a_service_names_flags_that_flower_knows(name: str):
    named = flags("\n".join(COMPOSE["services"][name]["command"]))
    assert len(named) >= 4
    assert named <= known_flags(f"flower-{name}")


def test_local_sh_names_flags_that_flower_knows():
    script = (DEPLOY / "local.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    for name in ("flower-superlink", "flower-supernode"):
        (line,) = re.findall(rf"^  start .* {name} (.*)$", script, flags=re.MULTILINE)
        assert flags(line) <= known_flags(name)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_a_unit(unit: Path, tmp_path: Path):
    there = Path("/bin/true")  # in the place of what is not installed under /opt here
    text = re.sub(r"/opt/metabloom/bin/flower-\w+", str(there), unit.read_text(encoding="utf-8"))
    copy = tmp_path / unit.name.replace("@.", "@hospital-a.")
    copy.write_text(text, encoding="utf-8")
    command = ["systemd-analyze", "verify", "--man=no", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "metabloom" in line]
    assert complaints == []


def test_the_environment_file_names_what_the_unit_reads():
    told = (DEPLOY / "systemd" / "supernode.env").read_text(encoding="utf-8")
    named = set(re.findall(r"^([A-Z_]+)=", told, flags=re.MULTILINE))
    read = set(
        re.findall(r"\$\{([A-Z_]+)\}", start_of(DEPLOY / "systemd/metabloom-supernode@.service"))
    )
    assert named == (read - {"CREDENTIALS_DIRECTORY"}) | {"METABLOOM_DATA"}


def test_a_killed_supernode_comes_back_after_flower_has_told_of_its_loss():
    script = (DEPLOY / "local.sh").read_text(encoding="utf-8")
    unit = (DEPLOY / "systemd" / "metabloom-supernode@.service").read_text(encoding="utf-8")
    waits = {
        int(re.search(r"^KILLED_S=(\d+)$", script, flags=re.MULTILINE)[1]),
        int(re.search(r"^RestartSec=(\d+)$", unit, flags=re.MULTILINE)[1]),
        int(re.search(r"sleep (\d+);", COMPOSE["services"]["supernode"]["entrypoint"][2])[1]),
        int(re.search(r"Why (\d+) s:", PAGE)[1]),
    }
    (wait,) = waits
    assert wait >= HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL + 2 * GRID_POLLS_S


def test_the_images_have_the_pinned_flower_and_every_dependency():
    recipe = COMPOSE["x-image"]["dockerfile_inline"]
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^FROM flwr/\S+:(\d+\.\d+\.\d+)-", recipe, flags=re.MULTILINE)[
        1
    ] in re.findall(r"^flwr==(.*)$", pins, flags=re.MULTILINE)
    installed = recipe.split("-c constraints.txt", 1)[1].split("\nWORKDIR", 1)[0].split("\nUSER")[0]
    names = set(installed.replace("\\", " ").split())
    declared = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert names == declared - {"flwr"}


def test_a_service_waits_and_then_starts_with_its_command():
    shell, option, program, name = COMPOSE["services"]["supernode"]["entrypoint"]
    program = program.replace("$$", "$").replace("sleep 75", "sleep 0")
    program = program.replace("flower-supernode", "printf '<%s>'")
    command = [shell, option, program, name, "--superlink=a", "--node-config=b c"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "<--superlink=a><--node-config=b c>"


def test_the_secrets_of_a_service_are_declared():
    for service in COMPOSE["services"].values():
        assert set(service["secrets"]) <= set(COMPOSE["secrets"])
        for path in re.findall(r"/run/secrets/(\S+)", "\n".join(service["command"])):
            assert path in service["secrets"]


def test_the_superlink_is_reached_through_nginx_alone():
    nginx = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    assert re.findall(r"location (\S+) \{\n\s+(\w+)", nginx) == [
        ("/v1/fleet/", "proxy_pass"),
        ("/", "return"),
    ]
    address = re.search(r"proxy_pass https://(127\.0\.0\.1):(\d+);", nginx)
    unit = start_of(DEPLOY / "systemd" / "metabloom-superlink.service")
    assert f"--host {address[1]} --port {address[2]}" in unit
    assert COMPOSE["services"]["superlink"]["ports"] == [f"{address[1]}:{address[2]}:{address[2]}"]


def test_the_production_run_has_keys_that_exist_and_goes_on_after_a_failure():
    config = RunConfig.read(RunConfig.read_toml(DEPLOY / "production.toml"))
    assert config.resume
    assert config.checkpoint_every == 1
    assert Path(config.out).is_absolute()


def test_the_source_archive_has_the_templates_and_no_secret(tmp_path: Path):
    for name in ("pyproject.toml", ".gitignore", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("secrets/ca.key", "secrets/hospital-a", "local/node-1/log", "local.sh"):
        (tmp_path / "deploy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "deploy" / name).write_text("")
    files = {file.relative_path for file in SdistBuilder(str(tmp_path)).recurse_included_files()}
    assert {file for file in files if file.startswith("deploy")} == {"deploy/local.sh"}


def test_the_page_names_files_and_subcommands_that_exist():
    for path in set(re.findall(r"deploy/[\w./@-]*\w", PAGE)):
        assert path in {"deploy/secrets", "deploy/local"} or (REPOSITORY / path).exists(), path
    for script, command in set(re.findall(r"deploy/(\w+\.sh) ([a-z]+)", PAGE)):
        usage = (DEPLOY / script).read_text(encoding="utf-8").split("TEXT")[1]
        assert f"deploy/{script} {command}" in usage

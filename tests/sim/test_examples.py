"""What the README files of the examples say is what the examples do, on the in-process grid."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from metabloom.sim import CohortGrid
from metabloom.wire import ROLL_CALL

EXAMPLES = Path(__file__).parents[2] / "examples"
PROJECTS = {
    "flower_server_our_clients": ("maml_clients", {"rounds": 5, "inner-lr": 0.5, "outer-lr": 0.5}),
    "our_strategy_foreign_clients": ("plain_clients", {"rounds": 5, "local-lr": 0.1}),
}


@pytest.fixture(params=sorted(PROJECTS))
def project(request, monkeypatch) -> Iterator[str]:
    """The name of a project whose package can be imported for the length of a test."""
    package, _ = PROJECTS[request.param]
    monkeypatch.syspath_prepend(EXAMPLES / request.param)
    yield request.param
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def readme(project: str) -> str:
    return " ".join((EXAMPLES / project / "README.md").read_text(encoding="utf-8").split())


def test_the_loss_falls_as_the_readme_says(project, capsys):
    package, config = PROJECTS[project]
    server = importlib.import_module(f"{package}.server_app").app
    client = importlib.import_module(f"{package}.client_app").app
    grid = CohortGrid(client, num_nodes=10, run_config=config)
    server(grid, Context(1, 0, {}, RecordDict(), run_config=config))
    found = [
        float(loss) for loss in re.findall(r"round \d: loss ([\d.]+)", capsys.readouterr().out)
    ]
    said = re.search(r"falls from about ([\d.]+) to ([\d.]+\d) in five rounds", readme(project))
    assert len(found) == 5
    # A strategy samples foreign clients by node ids, which each run draws anew.
    assert [found[0], found[-1]] == pytest.approx([float(said[1]), float(said[2])], abs=0.03)


def test_the_readme_of_the_foreign_clients_quotes_the_error_that_a_roll_call_gives(project):
    package, config = PROJECTS[project]
    client = importlib.import_module(f"{package}.client_app").app
    grid = CohortGrid(client, num_nodes=1, run_config=config)
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(RecordDict(), node, ROLL_CALL)])
    quoted = re.search(r"logs one error, `(.+?)`", readme(project))
    assert reply.has_error() == (quoted is not None)
    assert quoted is None or quoted[1] in reply.error.reason

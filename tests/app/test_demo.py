"""The demo reaches what the README says: unseen clients before and after adaptation."""

import json
from pathlib import Path

from typer.testing import CliRunner

from metabloom.cli import app


def test_the_demo_adapts_to_unseen_clients_by_far_more_than_25_points(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["simulate", "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    unseen = results["unseen"]
    assert results["clients"] == {"train": 48, "validation": 6, "unseen": 6}
    assert len(unseen["per_client"]) == 6
    # Labels are permuted for each client: before adaptation a model can only guess one of five.
    assert 0.1 < unseen["accuracy_before"] < 0.3
    assert unseen["accuracy_after"]["1"] - unseen["accuracy_before"] > 0.25
    assert unseen["accuracy_after"]["5"] - unseen["accuracy_before"] > 0.5

"""Which data sets private clients refuse, before any round, and what a run then says."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from metabloom.cli import app
from metabloom.errors import MetabloomError

PRIVATE = ("privacy.noise-multiplier=2", "privacy.expected-batch-size=3", "rounds=1")


@pytest.mark.parametrize("dataset", ["shakespeare", "heart-disease"])
def test_data_whose_records_depend_on_each_other_are_refused_before_a_ledger_is_begun(
    dataset: str, small_data: Path, tmp_path: Path
):
    settings = [*PRIVATE, f"data-root={small_data}", "clients-per-round=1"]
    if dataset == "shakespeare":
        settings += ["dataset-args=sequence_length=20"]
    words = [word for one in settings for word in ("--set", one)]
    command = ["simulate", "--dataset", dataset, *words, "--out", str(tmp_path)]
    with pytest.raises(MetabloomError, match=f"{dataset}: the records of this client depend"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "ledgers").exists()

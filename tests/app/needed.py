"""What single strategies need before they can run on digits with an MLP."""

from pathlib import Path

from safetensors.numpy import save_file

from metabloom.config import RunConfig
from metabloom.task import model_of

# Strategies whose clients keep something over the rounds.
LASTING = (
    *("ditto", "ds-fl", "fedkd", "fedmd", "meta-teacher", "pfedme", "teacher-student"),
    *("fedper", "fedrep", "lg-fedavg", "scaffold"),
)
TEACHER = "mlp hidden=24"


def needed(strategy: str, folder: Path) -> list[str]:
    """Return the settings without which ``strategy`` is refused; a teacher is put into a folder."""
    if strategy == "fedkd":
        return ["mentor=mlp hidden=24"]
    if strategy not in ("meta-teacher", "teacher-student"):
        return []
    model = model_of(RunConfig.read({"model": "mlp", "model-args": "hidden=24"}))
    file = folder / "teacher.safetensors"
    save_file({name: value.numpy() for name, value in model.state_dict().items()}, file)
    return [f"teacher={file}", f"teacher-model={TEACHER}"]

"""Who may import whom, and what library code never does: read from the source, nothing runs.

The tables come first; docs/ARCHITECTURE.md tells the same in words.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("metabloom", "models", "clients", "strategies", "sim")
WRITTEN_BY_HAND = (*LIBRARY, "tests", "benchmarks", "examples")
ROOMS = LIBRARY[1:]
OF_COMMANDS = ("cli_privacy", "cli_compare", "cli_pretrain")
APPS = ("server_app", "client_app", "cli", *OF_COMMANDS, "testing")
# The rest of metabloom/ are leaves.
ON_TOP = ("task", "pins", "simulation", "trials", "trial_pool", "comparison_plan", *APPS)

# importer -> what it may import. A dotted entry allows those names alone, not the whole room.
MAY_IMPORT: dict[str, set[str]] = {
    "leaves": set(),
    "models": {"leaves"},
    "clients": {"leaves", "models"},
    "strategies": {
        "leaves",
        "models.distillation",  # a server that distils has a loss to minimise
        "models.distillation_loss",
        "models.hypernetworks",  # pFedHN's server owns the hypernetwork
    },
    "sim": {"leaves", "models", "clients", "strategies"},
    "task": {"leaves", "models", "clients", "strategies", "sim"},
    "simulation": {"leaves", "sim", "task", "client_app"},
    "server_app": {"leaves", "models", "clients", "strategies", "sim", "task", "simulation"},
    "pins": {"leaves", "clients"},
    "client_app": {"leaves", "models", "clients", "strategies", "sim", "task", "pins"},
    "cli": {
        *("leaves", "models", "clients", "strategies", "sim", "task"),
        *("simulation", "server_app", "cli_privacy", "cli_compare", "cli_pretrain"),
    },
    "trials": {"leaves", "strategies", "sim", "simulation", "server_app"},
    "trial_pool": {"leaves", "trials"},
    "comparison_plan": {"leaves", "task"},
    "cli_compare": {"leaves", "strategies", "sim", "comparison_plan", "trials", "trial_pool"},
    "cli_pretrain": {"leaves", "sim", "task"},
    "cli_privacy": {"leaves", "models", "clients", "strategies", "sim", "task"},
    "testing": {"leaves", "sim", "task", "client_app", "server_app"},
}

# package -> (files that may import it, and the files among them that may not).
KEPT_TO: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ray": (("sim/*",), ()),
    "opacus": (
        ("clients/privacy/*", "metabloom/accounting.py", "metabloom/opacus_import.py"),
        (),
    ),
    "dp_accounting": (("metabloom/accounting.py",), ()),
    "flwr_datasets": (("sim/*",), ()),
    "datasets": (("sim/*",), ()),
    "flwr": (
        (
            *("metabloom/wire.py", "strategies/*", "clients/*", "sim/*"),
            *(f"metabloom/{app}.py" for app in APPS),
        ),
        (  # the mathematics knows no transport
            *(
                "strategies/rules.py",
                "strategies/aggregation.py",
                "strategies/consensus.py",
                "strategies/sound_outputs.py",
                "clients/meta_gradient.py",
                "clients/local_update.py",
            ),
            *("clients/objective.py", "clients/evaluation.py", "clients/batches.py"),
            *("clients/data.py", "metabloom/accounting.py", "metabloom/ledger.py"),
            *(f"clients/privacy/{name}.py" for name in ("config", "noise", "releases", "updates")),
        ),
    ),
}

# Loading one runs code that its sender chose. Arrays travel and rest as Flower arrays, safetensors
# and JSON.
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
PICKLING_CALLS = {"torch.load", "torch.save"}

# Streams are derived by identity (metabloom/streams.py), so nobody touches a global generator.
NUMPY_RANDOM = {"Generator", "BitGenerator", "SeedSequence", "default_rng", "PCG64", "Philox"}
GLOBAL_RANDOM = re.compile(
    r"torch\.(random\b.*|manual_seed|seed|initial_seed|set_rng_state|default_generator\b.*)"
    r"|torch\.(cuda|mps|xpu)\.(manual_seed|manual_seed_all|seed|seed_all|set_rng_state)"
)
NEEDS_GENERATOR = {f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "normal")}
MAY_USE_GLOBAL_RANDOM = {
    "metabloom/streams.py": "forks and restores torch's generator where torch offers no other",
}

LONGEST_FILE = 400
IMPORT_TO_DISTRIBUTION = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "flwr_datasets": "flwr-datasets",
    "dp_accounting": "dp-accounting",
}


def room_of_file(path: str) -> str:
    """``"models/cnn.py"`` is in ``"models"``, ``"metabloom/wire.py"`` in ``"leaves"``."""
    folder, _, rest = path.partition("/")
    if folder in ROOMS:
        return folder
    stem = rest.removesuffix(".py")
    return stem if stem in ON_TOP else "leaves"


def room_of_name(name: str) -> str:
    """``"metabloom.models.cnn"`` is in ``"models"``, ``"metabloom.wire"`` in ``"leaves"``."""
    second = [*name.split("."), ""][1]
    return second if second in (*ROOMS, *ON_TOP) else "leaves"


def package_of(path: str) -> list[str]:
    """The package that relative imports in ``path`` start from: ``["metabloom", "models"]``."""
    folders = path.split("/")[:-1]
    return folders if folders[0] == "metabloom" else ["metabloom", *folders]


def imported(tree: ast.AST, path: str) -> Iterator[tuple[int, str, str, bool]]:
    """Yield (line, full name, local name, whether relative) of every import, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                yield node.lineno, alias.name, local, False
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield node.lineno, full, alias.asname or alias.name, node.level > 0
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in {"__import__", "import_module", "importlib.import_module"}:
                yield node.lineno, str(node.args[0].value), "", False


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """``np.random.rand`` as ``"numpy.random.rand"``; empty where it does not start at an import."""
    if isinstance(node, ast.Attribute):
        start = dotted(node.value, names)
        return f"{start}.{node.attr}" if start else ""
    return names.get(node.id, "") if isinstance(node, ast.Name) else ""


def wrong_import(path: str, name: str, relative: bool) -> str | None:
    top, room = name.split(".")[0], room_of_file(path)
    if top in ROOMS and not relative:
        return f"imports {name!r}: that would be a second copy, write `from ..{top}`"
    if top == "metabloom":
        if not relative:
            return f"imports {name!r} by its full name: write it relative"
        other = room_of_name(name)
        inside = name.removeprefix("metabloom.") + "."
        whole = other == room or other in MAY_IMPORT[room]
        part = any(inside.startswith(f"{allowed}.") for allowed in MAY_IMPORT[room])
        return None if whole or part else f"imports {name!r}, which {room} may not import"
    if top in PICKLES:
        return f"imports {top!r}: no pickle on the wire or on disk"
    if top == "random":
        return "imports 'random': derive a stream (metabloom/streams.py)"
    if top in KEPT_TO:
        where, but_not = KEPT_TO[top]
        inside_edge = any(fnmatch(path, glob) for glob in where)
        if not inside_edge or any(fnmatch(path, glob) for glob in but_not):
            return f"imports {top!r}, which is kept to {', '.join(where)}"
    return None


def wrong_use(node: ast.AST, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Call):
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        pickled = keywords.get("allow_pickle")
        if isinstance(pickled, ast.Constant) and pickled.value:
            return "allows pickle: no pickle on the wire or on disk"
        name = dotted(node.func, names)
        if name in NEEDS_GENERATOR and not {"generator", None} & set(keywords):
            return f"calls {name} without a generator: pass one (metabloom/streams.py)"
    if isinstance(node, ast.Attribute | ast.Name):
        name = dotted(node, names)
        if name in PICKLING_CALLS:
            return f"uses {name}, which pickles: use safetensors"
        numpy_random = re.fullmatch(r"numpy\.random\.(\w+)", name)
        unseeded = numpy_random and numpy_random[1] not in NUMPY_RANDOM
        if unseeded or GLOBAL_RANDOM.fullmatch(name):
            return f"uses {name}, which is global: derive a stream (metabloom/streams.py)"
    return None


def violations(path: str, source: str) -> list[str]:
    """Return what a library file does that it must not, one line each with its place."""
    tree = ast.parse(source)
    found: set[tuple[int, str]] = set()
    names: dict[str, str] = {}
    for line, name, local, relative in imported(tree, path):
        # `import a.b` binds a, `import a.b as c` binds a.b, `from a import b` binds a.b.
        names[local] = local if name.split(".")[0] == local else name
        if complaint := wrong_import(path, name, relative):
            found.add((line, complaint))
    for node in ast.walk(tree):
        complaint = wrong_use(node, names)
        if complaint and not ("stream" in complaint and path in MAY_USE_GLOBAL_RANDOM):
            found.add((node.lineno, complaint))  # type: ignore[attr-defined]  # every match has one
    if Path(path).stem in {"utils", "util"}:
        found.add((1, "is called utils: name the idea"))
    return [f"{path}:{line}: {complaint}" for line, complaint in sorted(found)]


def sources(folders: tuple[str, ...]) -> list[str]:
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


@pytest.mark.parametrize("path", sources(LIBRARY))
def test_a_module_keeps_the_house_rules(path: str):
    wrong = violations(path, (ROOT / path).read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sources(WRITTEN_BY_HAND))
def test_a_file_is_short_enough_to_read(path: str):
    length = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert length <= LONGEST_FILE, f"{path} has {length} lines: split it by idea"


@pytest.mark.parametrize("path", sources(LIBRARY))
def test_a_module_imports_declared_packages_only(path: str):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]}
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    tops = {name.split(".")[0] for _, name, _, _ in imported(tree, path)}
    foreign = tops - set(sys.stdlib_module_names) - {"metabloom"}
    undeclared = {top for top in foreign if IMPORT_TO_DISTRIBUTION.get(top, top) not in declared}
    assert not undeclared, f"{path} imports what pyproject.toml does not declare: {undeclared}"


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("metabloom/wire.py", "from .models import CNN", "leaves may not import"),
        ("metabloom/wire.py", "from . import models", "leaves may not import"),
        ("models/cnn.py", "from ..clients import adapt", "models may not import"),
        ("models/deep/cnn.py", "from ...sim import x", "models may not import"),
        ("clients/maml.py", "from ..strategies.fedmeta import FedMeta", "clients may not import"),
        ("clients/maml.py", "def f():\n    from ..sim import Federation", ":2: imports"),
        ("strategies/fedmeta.py", "from ..clients import adapt", "strategies may not import"),
        ("strategies/fedmeta.py", "from ..models import CNN", "strategies may not import"),
        (
            "strategies/fedmeta.py",
            "from ..models.distilled import x",
            "strategies may not import",
        ),
        ("sim/grid.py", "from ..server_app import app", "sim may not import"),
        ("sim/grid.py", "from ..task import model_of", "sim may not import"),
        ("metabloom/task.py", "from .server_app import app", "task may not import"),
        ("metabloom/server_app.py", "from .cli import main", "server_app may not import"),
        ("metabloom/client_app.py", "from .server_app import app", "client_app may not import"),
        ("sim/grid.py", "import metabloom.models", "write it relative"),
        ("sim/grid.py", "from models import CNN", "second copy"),
        ("clients/maml.py", "import ray", "kept to sim/*"),
        ("clients/maml.py", "import importlib\nimportlib.import_module('ray.util')", "'ray'"),
        ("clients/maml.py", "from opacus import GradSampleModule", "kept to clients/privacy/*"),
        ("models/cnn.py", "from flwr.app import Context", "'flwr'"),
        ("clients/meta_gradient.py", "from flwr.app import Context", "'flwr'"),
        ("strategies/rules.py", "from flwr.app import Message", "'flwr'"),
        ("metabloom/streams.py", "import flwr", "'flwr'"),
        ("strategies/utils.py", "", "name the idea"),
        ("strategies/save.py", "import pickle", "no pickle"),
        ("strategies/save.py", "from cloudpickle import dumps", "no pickle"),
        ("strategies/save.py", "import torch\ntorch.save({}, 'x')", "uses torch.save"),
        ("strategies/save.py", "from torch import load as read\nread('x')", "uses torch.load"),
        ("sim/data.py", "import numpy\nnumpy.load('x', allow_pickle=True)", "allows pickle"),
        ("sim/data.py", "import random", "imports 'random'"),
        ("sim/data.py", "from random import shuffle", "imports 'random'"),
        ("sim/data.py", "import numpy as np\nnp.random.seed(0)", "numpy.random.seed"),
        ("sim/data.py", "from numpy import random as r\nr.shuffle([])", "numpy.random.shuffle"),
        ("sim/data.py", "from numpy.random import rand\nrand()", "numpy.random.rand"),
        ("sim/data.py", "import torch\ntorch.manual_seed(0)", "torch.manual_seed"),
        ("sim/data.py", "import torch as t\nt.cuda.manual_seed_all(0)", "manual_seed_all"),
        ("sim/data.py", "from torch import manual_seed\nmanual_seed(0)", "torch.manual_seed"),
        ("sim/data.py", "import torch\ntorch.random.fork_rng()", "torch.random.fork_rng"),
        ("sim/data.py", "import torch\ntorch.randn(3)", "without a generator"),
    ],
)
def test_a_broken_rule_is_refused(path: str, source: str, complaint: str):
    assert any(complaint in line for line in violations(path, source)), violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/cnn.py", "from .. import __version__\nfrom ..errors import ModelError"),
        ("models/cnn.py", "from torch.nn.modules import batchnorm\nfrom torchvision import models"),
        ("clients/maml.py", "from ..models import CNN\nfrom flwr.client import NumPyClient"),
        ("clients/privacy/releases.py", "from opacus.accountants import RDPAccountant"),
        (
            "strategies/feddf.py",
            "from ..models.distillation import kl_to\nfrom .. import wire",
        ),
        ("strategies/feddf.py", "from ..models import distillation_loss"),
        (
            "sim/grid.py",
            "import ray\nfrom ..strategies import FedMeta\nfrom ..clients import adapt",
        ),
        ("metabloom/cli.py", "from .server_app import app\nfrom .sim import CohortGrid"),
        ("metabloom/streams.py", "import torch\ntorch.random.fork_rng(devices=[])"),
        ("sim/data.py", "import numpy as np\nnp.random.default_rng(1).random()"),
        ("sim/data.py", "import torch\ng = torch.Generator().manual_seed(1)"),
        ("sim/data.py", "import torch\ntorch.randperm(3, generator=torch.Generator())"),
    ],
)
def test_what_the_rules_allow_passes(path: str, source: str):
    assert violations(path, source) == []


def test_every_exception_names_a_file_that_exists_and_needs_it():
    for path in MAY_USE_GLOBAL_RANDOM:
        source = (ROOT / path).read_text(encoding="utf-8")
        elsewhere = violations("metabloom/elsewhere.py", source)
        assert any("stream" in line for line in elsewhere), f"{path} needs no exception any more"

"""Rows on teachers for clients: a federated teacher of a student, a meta-trained one."""

from collections.abc import Iterator, Sequence
from typing import Any

from distillation_data import NAMES
from distillation_logits import total
from distillation_models import CNN
from distillation_page import Line, Verdict, minus
from distillation_runs import Found, Settings
from distillation_setting import Setting, megabytes, of_one_model

BAR, META_BAR = 1.0, 5.0  # points

SKEWED: Settings = {
    "dataset": NAMES["mnist"],
    "dataset-args": "alpha=0.3",
    "num-clients": 26,  # 20 train, 3 validate, 3 are unseen
    "clients-per-round": 10,
    "rounds": 20,
    "local-epochs": 2,
    "batch-size": 32,
    "eval-every": 1,
}
TEACHER = {"model": CNN, "model-args": "width=16"}
STUDENT = {"model": "mlp", "model-args": "hidden=16"}
LARGE, DIRECT, TAUGHT = "teacher, FedAvg", "student, FedAvg", "student, taught"

OMNIGLOT: Settings = {
    "dataset": "omniglot",
    "dataset-args": "image_size=15",
    "num-clients": 400,  # 320 train, 40 validate, 40 are unseen
    "strategy": "fedmeta",
    "rounds": 300,
    "eval-every": 300,
    "eval-steps": "1,5,20",
    "inner-lr": 0.3,
    "outer-lr": 0.003,
}
META_TEACHER = {"model": "conv4", "model-args": "width=32"}
META_STUDENT = {"model": "mlp", "model-args": "hidden=16"}

ABOUT = {
    "teacher": (
        "A federated teacher, then a federated student",
        f"MNIST, 20 training clients with 10,000 images together, by Dirichlet(0.3), 10 a round, "
        f"20 rounds. Teacher: `{TEACHER['model']} {TEACHER['model-args']}` by FedAvg; student: "
        f"`{STUDENT['model']} {STUDENT['model-args']}`, taught by soft targets that each client "
        "computes on its own images, or trained directly by FedAvg: for as many rounds, for as "
        "many bytes as teaching takes with the teacher's broadcast, and for those of both stages.",
    ),
    "meta-teacher": (
        "A meta-trained teacher, adapted on a client, teaches a small student there",
        "Omniglot, 5-way 1-shot, unseen alphabets, labels permuted for each client, images of 15 x "
        f"15; 300 rounds. Teacher: `{META_TEACHER['model']} {META_TEACHER['model-args']}`; "
        f"student: `{META_STUDENT['model']} {META_STUDENT['model-args']}`; both meta-trained by "
        "exact MAML. Both students are judged on the same half of a client's query images; the "
        "other half is unlabelled and only the taught one sees it. Direct: the best number of "
        "steps, by validation.",
    ),
}


def taught_by(large: Settings) -> Settings:
    """Return the method of a student that the run with these settings teaches, with its grid."""
    return {
        **SKEWED,
        **STUDENT,
        "strategy": "teacher-student",
        "teacher": large,
        "teacher-model": f"{TEACHER['model']} {TEACHER['model-args']}",
        "checkpoint-every": 20,  # clients keep what the teacher said
        "local-lr": (0.1, 0.3),
        "distill-temperature": (2.0, 4.0),
        "distill-alpha": 0.9,
    }


def teacher(setting: Setting) -> Iterator[Line | Verdict]:
    """Yield the lines of teacher, taught student and student alone, at equal rounds and bytes."""
    rates = {"strategy": "fedavg", "local-lr": (0.03, 0.1, 0.3, 1.0)}
    methods: dict[str, Settings] = {
        LARGE: {**SKEWED, **TEACHER, **rates},
        DIRECT: {**SKEWED, **STUDENT, **rates},
    }
    chosen = setting.chosen(methods)
    large, direct = (setting.started(without_validation(chosen[name])) for name in methods)
    large_found = large.found  # all seeds, before anybody learns from them
    methods[TAUGHT] = taught_by(large.settings)
    settings = setting.chosen({TAUGHT: methods[TAUGHT]})[TAUGHT]
    taught = setting.started(without_validation(settings))
    lines = {
        name: runs.line(name, methods[name], of_one_model, megabytes)
        for name, runs in ((LARGE, large), (DIRECT, direct), (TAUGHT, taught))
    }
    yield from lines.values()
    yield minus(f"{TAUGHT}, minus {DIRECT}", lines[TAUGHT], lines[DIRECT], bar=BAR)
    budgets = {
        "the bytes of its teaching": _megabytes(taught.found),
        "the bytes of both stages": _megabytes(taught.found) + _megabytes(large_found),
    }
    of_a_round = _megabytes(direct.found) / direct.settings["rounds"]
    for name, budget in budgets.items():
        rounds = max(1, round(budget / of_a_round))
        longer = setting.started({**direct.settings, "rounds": rounds})
        line = longer.line(
            f"{DIRECT}, {name}: {rounds} rounds", methods[DIRECT], of_one_model, megabytes
        )
        yield line
        yield minus(f"{TAUGHT}, minus {line.what}", lines[TAUGHT], line)


def meta_teacher(setting: Setting) -> Iterator[Line | Verdict]:
    """Yield the lines of students on unseen clients: taught there, and adapted directly."""
    large = setting.sized({**OMNIGLOT, **META_TEACHER})
    for run in [setting.runs.submit(large, seed) for seed in (0, *setting.seeds)]:
        run.result()
    method: Settings = {
        **OMNIGLOT,
        **META_STUDENT,
        "strategy": "meta-teacher",
        "teacher": large,
        "teacher-model": f"{META_TEACHER['model']} {META_TEACHER['model-args']}",
        "teach-steps": 100,
        "distill-alpha": 0.9,
        "teach-lr": (0.01, 0.1),
        "distill-temperature": (1.0, 4.0),
    }
    settings = setting.chosen({TAUGHT: method}, lambda found: metric(found, "taught-accuracy"))
    runs = setting.started(settings[TAUGHT])
    proving = runs.found[0] if 0 in setting.seeds else runs.found[-1]
    steps = max(
        str(settings[TAUGHT]["eval-steps"]).split(","),
        key=lambda n: metric(proving, f"accuracy-after-{n}"),
    )
    shown = {
        "the teacher itself": "teacher-accuracy",
        "student, taught": "taught-accuracy",
        f"student, adapted directly, {steps} steps": f"accuracy-after-{steps}",
    }
    lines = [
        runs.line(what, method if "taught" in key else {}, _judged_by(key))
        for what, key in shown.items()
    ]
    yield from lines
    yield minus("taught minus adapted directly", lines[1], lines[2], bar=META_BAR)


def without_validation(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of the same run, but for the bytes that validation takes."""
    return {**settings, "eval-every": 0}


def metric(found: Found, name: str, role: str = "validation") -> float:
    """Return the mean of a metric over the clients of a role."""
    return float(found["metrics"][role][name])


def _judged_by(name: str) -> Any:
    def accuracy(found: Sequence[Found]) -> dict[str, list[float]]:
        return {"accuracy": [metric(one, name, "unseen") for one in found]}

    return accuracy


def _megabytes(found: Sequence[Found]) -> float:
    sums = total(megabytes(found))
    return sum(sums) / len(sums)

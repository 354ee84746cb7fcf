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
LARGE, DIRECT, TAUGHT = "teacher, FedAvg", "student, FedAvg", "student, taught"
# name of the size -> what all have, what the teacher has, what the student has
SIZES: dict[str, tuple[Settings, Settings, Settings]] = {
    "2,000 images": (
        {**SKEWED, "dataset-args": "alpha=0.3 limit=2000", "local-epochs": 10, "eval-every": 5},
        {"rounds": 60, "eval-every": 10},
        {"model": "mlp", "model-args": "hidden=64"},
    ),
    "10,000 images": (SKEWED, {}, {"model": "mlp", "model-args": "hidden=16"}),
}

OMNIGLOT: Settings = {
    "dataset": "omniglot",
    "dataset-args": "image_size=15",
    "num-clients": 400,  # 320 train, 40 validate, 40 are unseen
    "strategy": "fedmeta",
    "inner-lr": 0.3,
    "outer-lr": 0.003,
}
META_TEACHER: Settings = {
    **OMNIGLOT,
    "model": "conv4",
    "model-args": "width=32",
    "rounds": 1000,
    "eval-every": 250,
    "eval-steps": "1,5,20",
}
META_STUDENT: Settings = {
    **OMNIGLOT,
    "dataset-args": "image_size=15 query_shots=19",
    "num-clients": 180,  # 144 train, 18 validate, 18 are unseen: all drawers of a character
    "model": "mlp",
    "model-args": "hidden=16",
    "rounds": 300,
    "eval-every": 300,
    "eval-steps": "1,5,20",
}

ABOUT = {
    "teacher": (
        "A federated teacher, then a federated student",
        f"MNIST, 20 training clients by Dirichlet(0.3), 10 a round, 20 rounds of the student. "
        f"Teacher: `{TEACHER['model']} {TEACHER['model-args']}` by FedAvg; student: an MLP, taught "
        "by soft targets that each client computes on its own images, or trained directly by "
        "FedAvg: for as many rounds, for as many bytes as teaching takes with the teacher's "
        "broadcast, and for those of both stages. 10,000 images together: two local epochs, a "
        "student of 16 hidden units, a teacher of 20 rounds: this was tried first. 2,000 images: "
        "ten local epochs, 64 hidden units, a teacher of 60 rounds; chosen by the validation "
        "clients of seed 0 among nine settings of data, skew, epochs, student and teacher. With "
        "five local epochs the gain on unseen clients was 1.0 ± 0.9 points.",
    ),
    "meta-teacher": (
        "A meta-trained teacher, adapted on a client, teaches a small student there",
        "Omniglot, 5-way 1-shot, unseen alphabets, labels permuted for each client, images of 15 x "
        f"15. Teacher: `{META_TEACHER['model']} {META_TEACHER['model-args']}`, "
        f"{META_TEACHER['rounds']} rounds; student: `{META_STUDENT['model']} "
        f"{META_STUDENT['model-args']}`, {META_STUDENT['rounds']} rounds; both meta-trained by "
        "exact MAML with one inner step. Clients that are judged have 5 labelled images and 95 "
        "others: both students are judged on the same half of these; the other half is unlabelled "
        "and only the taught one sees it. Direct: the best inner-lr of three, and the best number "
        "of steps, by validation. With a teacher of 300 rounds, adapted by 20 steps, and 12 "
        "unlabelled images the taught student lost 0.5 points on average: this was tried first. "
        "With 5 labelled images of each class, on the validation clients of seed 0, the teacher "
        "had 70.6 %, the taught student 68.7 and the other 70.3.",
    ),
}


def taught_by(large: Settings, skewed: Settings, student: Settings) -> Settings:
    """Return the method of a student that the run with these settings teaches, with its grid."""
    return {
        **skewed,
        **student,
        "strategy": "teacher-student",
        "teacher": large,
        "teacher-model": f"{TEACHER['model']} {TEACHER['model-args']}",
        "checkpoint-every": 20,  # clients keep what the teacher said
        "local-lr": (0.1, 0.2),
        "distill-temperature": 4.0,
        "distill-alpha": (0.5, 0.9),
    }


def teacher(setting: Setting) -> Iterator[Line | Verdict]:
    """Yield the lines of teacher, taught student and student alone, at equal rounds and bytes."""
    for name, sizes in SIZES.items():
        yield from _of_size(setting, name, *sizes)


def _of_size(
    setting: Setting, size: str, skewed: Settings, longer_teacher: Settings, student: Settings
) -> Iterator[Line | Verdict]:
    rates = {"strategy": "fedavg", "local-lr": (0.03, 0.1, 0.3, 1.0)}
    methods: dict[str, Settings] = {
        LARGE: {**skewed, **TEACHER, **rates, **longer_teacher},
        DIRECT: {**skewed, **student, **rates},
    }
    chosen = setting.chosen(methods)
    large, direct = (setting.started(without_validation(chosen[name])) for name in methods)
    large_found = large.found  # all seeds, before anybody learns from them
    methods[TAUGHT] = taught_by(large.settings, skewed, student)
    settings = setting.chosen({TAUGHT: methods[TAUGHT]})[TAUGHT]
    taught = setting.started(without_validation(settings))
    lines = {
        name: runs.line(f"{size}: {name}", methods[name], of_one_model, megabytes)
        for name, runs in ((LARGE, large), (DIRECT, direct), (TAUGHT, taught))
    }
    yield from lines.values()
    yield minus(f"{size}: {TAUGHT}, minus {DIRECT}", lines[TAUGHT], lines[DIRECT], bar=BAR)
    budgets = {
        "the bytes of its teaching": _megabytes(taught.found),
        "the bytes of both stages": _megabytes(taught.found) + _megabytes(large_found),
    }
    of_a_round = _megabytes(direct.found) / direct.settings["rounds"]
    for name, budget in budgets.items():
        rounds = max(1, round(budget / of_a_round))
        longer = setting.started({**direct.settings, "rounds": rounds})
        line = longer.line(
            f"{size}: {DIRECT}, {name}: {rounds} rounds", methods[DIRECT], of_one_model, megabytes
        )
        yield line
        yield minus(f"{size}: {TAUGHT}, minus {DIRECT}, {name}", lines[TAUGHT], line)


def meta_teacher(setting: Setting) -> Iterator[Line | Verdict]:
    """Yield the lines of students on unseen clients: taught there, and adapted directly."""
    large = setting.sized(META_TEACHER)
    for run in [setting.runs.submit(large, seed) for seed in (0, *setting.seeds)]:
        run.result()
    direct: Settings = {**META_STUDENT, "inner-lr": (0.3, 1.0, 3.0)}
    rate = setting.chosen({DIRECT: direct}, _after_the_best_steps)[DIRECT]["inner-lr"]
    method: Settings = {
        **META_STUDENT,
        "strategy": "meta-teacher",
        "inner-lr": rate,
        "teacher": large,
        "teacher-model": f"{META_TEACHER['model']} {META_TEACHER['model-args']}",
        "teacher-steps": 1,  # as it was trained
        "teach-steps": 100,
        "distill-alpha": 0.9,
        "teach-lr": (0.01, 0.03),
        "distill-temperature": (1.0, 4.0),
    }
    settings = setting.chosen({TAUGHT: method}, lambda found: metric(found, "taught-accuracy"))
    runs = setting.started(settings[TAUGHT])
    proving = runs.found[0] if 0 in setting.seeds else runs.found[-1]
    steps = _best_steps(proving)
    shown = {
        "the teacher itself": "teacher-accuracy",
        "student, taught": "taught-accuracy",
        f"student, adapted directly, {steps} steps": f"accuracy-after-{steps}",
    }
    grids = {"taught-accuracy": method, f"accuracy-after-{steps}": direct}
    lines = [runs.line(what, grids.get(key, {}), _judged_by(key)) for what, key in shown.items()]
    yield from lines
    yield minus("taught minus adapted directly", lines[1], lines[2], bar=META_BAR)


def without_validation(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of the same run, but for the bytes that validation takes."""
    return {**settings, "eval-every": 0}


def _best_steps(found: Found) -> str:
    """Return the number of steps after which validation clients do best."""
    steps: list[str] = str(found["settings"]["eval-steps"]).split(",")
    return max(steps, key=lambda n: metric(found, f"accuracy-after-{n}"))


def _after_the_best_steps(found: Found) -> float:
    return metric(found, f"accuracy-after-{_best_steps(found)}")


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

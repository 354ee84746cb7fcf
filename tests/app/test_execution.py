"""In how many processes a run is carried out, and by which kernel: decided before it starts."""

import pytest

from metabloom.config import FREE_WHEN_RESUMED, RunConfig
from metabloom.errors import ConfigError
from metabloom.execution import (
    COMPILED_FROM,
    FEWEST_CLIENTS,
    FEWEST_UPDATES,
    Machine,
    idle_under_flower,
    kernel_of,
    kernel_under_flower,
    local_steps,
    resolved,
    workers_of,
)

LAPTOP = Machine("cpu", cores=4)
ONE_CORE = Machine("cpu", cores=1)
SERVER = Machine("cuda", cores=16, gpus=2)
LARGE = {"clients-per-round": 200, "rounds": 100}


def config_of(**keys: object) -> RunConfig:
    return RunConfig.read({key.replace("_", "-"): value for key, value in keys.items()})


@pytest.mark.parametrize(
    ("keys", "machine", "workers"),
    [
        # Small runs stay in one process: either bound decides.
        ({}, LAPTOP, 0),
        ({"clients-per-round": FEWEST_CLIENTS - 1, "rounds": 10**6}, LAPTOP, 0),
        (
            {"clients-per-round": FEWEST_CLIENTS, "rounds": FEWEST_UPDATES // FEWEST_CLIENTS},
            LAPTOP,
            4,
        ),
        ({"clients-per-round": FEWEST_UPDATES - 1, "rounds": 1}, LAPTOP, 0),
        ({"clients-per-round": FEWEST_UPDATES, "rounds": 1}, LAPTOP, 4),
        (LARGE, LAPTOP, 4),
        (LARGE, ONE_CORE, 0),
        (LARGE, SERVER, 2),  # one for each GPU
        (LARGE, Machine("cuda", cores=16, gpus=1), 0),
        (LARGE, Machine("cpu", cores=16, gpus=2), 16),  # device = "cpu" beside GPUs
        # A number is taken as it is.
        ({"workers": 3}, LAPTOP, 3),
        ({"workers": 0, **LARGE}, LAPTOP, 0),
        ({"workers": 5}, SERVER, 5),
        # What only workers heed asks for them.
        ({"client-timeout-s": 5}, LAPTOP, 4),
        ({"client-timeout-s": 5}, ONE_CORE, 1),
        ({"gpus-per-worker": 0.5}, SERVER, 4),
        ({"gpus-per-worker": 0.1}, SERVER, 20),
        ({"gpus-per-worker": 4}, SERVER, 1),
        ({"ray-address": "auto"}, LAPTOP, None),
        ({"ray-address": "auto", **LARGE}, SERVER, None),
        ({"ray-address": "head:6379", "workers": 64}, LAPTOP, 64),
    ],
)
def test_workers_follow_the_machine_and_the_size_of_the_run(
    keys: dict[str, object], machine: Machine, workers: int | None
) -> None:
    assert workers_of(RunConfig.read(keys), machine) == workers


@pytest.mark.parametrize(
    ("keys", "device", "workers", "kernel"),
    [
        ({}, "cpu", 0, "eager"),
        ({}, "cuda", 0, "vmap"),
        (LARGE, "cpu", 0, "compiled"),
        (LARGE, "cpu", 2, "compiled"),
        (LARGE, "cpu", 4, "eager"),  # 5,000 steps each
        ({"clients-per-round": COMPILED_FROM, "rounds": 1}, "cpu", 1, "compiled"),
        ({"clients-per-round": COMPILED_FROM - 1, "rounds": 1}, "cpu", 0, "eager"),
        ({"clients-per-round": COMPILED_FROM, "rounds": 1}, "cpu", 2, "eager"),
        ({**LARGE, "local-epochs": 2}, "cpu", 4, "compiled"),
        ({"kernel": "vmap"}, "cpu", 0, "vmap"),
        ({"kernel": "eager", **LARGE}, "cuda", 0, "eager"),
        ({"kernel": "compiled"}, "cuda", 2, "compiled"),
    ],
)
def test_the_kernel_follows_the_device_and_the_steps_of_a_worker(
    keys: dict[str, object], device: str, workers: int, kernel: str
) -> None:
    assert kernel_of(RunConfig.read(keys), device, workers) == kernel


def test_local_steps_are_those_of_all_replies_of_a_run() -> None:
    keys = {"rounds": 2, "clients_per_round": 3, "local_epochs": 5, "local_steps": 7}
    assert local_steps(config_of(**keys, inner_steps=11)) == 2 * 3 * 5 * 7 * 11


@pytest.mark.parametrize("machine", [LAPTOP, ONE_CORE, SERVER])
@pytest.mark.parametrize("keys", [{}, LARGE, {"workers": 2, "kernel": "eager"}])
def test_nothing_is_left_to_be_decided_and_nothing_else_is_changed(
    keys: dict[str, object], machine: Machine
) -> None:
    config = RunConfig.read(keys)
    carried_out = resolved(config, machine)
    assert "auto" not in (carried_out.engine, carried_out.workers, carried_out.kernel)
    assert resolved(carried_out, machine) == carried_out
    assert RunConfig.read(carried_out.to_flower()) == carried_out
    assert carried_out.identity() == config.identity()
    before, after = config.to_flower(), carried_out.to_flower()
    changed = {key for key, value in after.items() if before[key] != value}
    assert changed <= {"engine", "workers", "kernel"}


def test_a_cluster_is_asked_for_its_cores_later() -> None:
    carried_out = resolved(config_of(ray_address="auto", kernel="eager"), LAPTOP)
    assert carried_out.workers == "auto"
    # Until then the cores here stand for those there.
    assert resolved(config_of(ray_address="auto", **LARGE), LAPTOP).kernel == "eager"
    assert resolved(config_of(ray_address="auto", **LARGE), ONE_CORE).kernel == "compiled"


def test_no_key_of_the_engine_hinders_a_resumed_run() -> None:
    keys = ("engine", "workers", "kernel", "ray_address", "gpus_per_worker", "client_timeout_s")
    assert set(keys) <= set(FREE_WHEN_RESUMED)


@pytest.mark.parametrize(
    ("kernel", "used"), [("auto", "eager"), ("eager", "eager"), ("compiled", "compiled")]
)
def test_under_flowers_engine_clients_compute_one_at_a_time(kernel: str, used: str) -> None:
    assert kernel_under_flower(config_of(kernel=kernel, **LARGE)) == used


def test_vmap_under_flowers_engine_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"kernel = 'vmap'.*engine = 'cohort'"):
        kernel_under_flower(config_of(kernel="vmap"))


def test_keys_that_flowers_engine_does_not_heed_are_told() -> None:
    assert idle_under_flower(config_of(kernel="compiled", device="cpu")) == []
    keys = {"workers": 2, "ray_address": "auto", "gpus_per_worker": 0.5, "client_timeout_s": 3}
    assert idle_under_flower(config_of(**keys)) == [
        *("workers", "ray-address", "gpus-per-worker", "client-timeout-s")
    ]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"engine": "ray"}, "engine = 'ray'"),
        ({"kernel": "fast"}, "kernel = 'fast'"),
        ({"workers": -1}, "workers = -1: must be 'auto' or a whole number of at least 0"),
        ({"workers": 1.5}, "workers = 1.5: must be 'auto' or a whole number"),
        ({"workers": "many"}, "workers = 'many': must be 'auto' or a whole number"),
        ({"workers": "²"}, "workers = '²': must be 'auto' or a whole number"),
        ({"workers": True}, "workers = True: a number or a text is needed"),
        ({"gpus-per-worker": -0.5}, "gpus-per-worker = -0.5: input should be greater than or"),
        ({"gpus-per-worker": "inf"}, "gpus-per-worker = 'inf': input should be a finite number"),
        ({"client-timeout-s": -1}, "client-timeout-s = -1: input should be greater than or"),
        ({"client-timeout-s": "nan"}, "client-timeout-s = 'nan': input should be a finite number"),
        ({"workers": 0, "ray-address": "auto"}, "ray-address is set, but workers = 0"),
        ({"workers": 0, "gpus-per-worker": 1}, "gpus-per-worker is set, but workers = 0"),
        ({"workers": "0", "client-timeout-s": 1}, "client-timeout-s is set, but workers = 0"),
    ],
)
def test_a_value_that_cannot_work_is_refused_in_one_line(
    keys: dict[str, object], expected: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        RunConfig.read(keys)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("given", "read"), [("auto", "auto"), (2, "2"), (" 02 ", "2"), (0, "0")])
def test_workers_are_a_number_or_auto(given: object, read: str) -> None:
    assert RunConfig.read({"workers": given}).workers == read

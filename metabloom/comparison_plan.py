"""What a comparison does, all of it checked before the first run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import RunConfig
from .errors import ConfigError
from .keys import key_of, parse_options
from .task import (
    NEEDED,
    STRATEGY_KEYS,
    federation_of,
    idle_keys,
    keys_read,
    models_of,
    public_kind,
    recipe_of,
)
from .tuning import (
    MOST_ROUNDS,
    Budget,
    Entry,
    Grid,
    Settings,
    evaluated_every,
    overridden,
    tries_of,
    usual_grid,
)

TRIALS = "trials"  # folder of runs in that of the comparison
BY_OPTION = {  # keys that a comparison sets itself, and by what a user sets them
    "strategy": "--strategies",
    "out": "--out",
    "resume": "the same command again, which goes on",
    "max-bytes": "--budget bytes=",
    "max-seconds": "--budget seconds=",
    "score-unseen": "the runs of the chosen settings, whose unseen clients do score",
}


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison.

    Attributes:
        base: keys of every run.
        of_runs: those that spend the budget of a run of a chosen setting.
        of_tries: those of a try, whose unseen clients nobody asks.
        entries: the methods.
        grids: what is tuned, by the name of a method.
        tries: the points that are tried of it.
        budget: of a run.
        tune_budget: of a try.
        tuning_seed: of all tries.
        seeds: of the runs.
        root: where runs have their folders.
    """

    base: Mapping[str, object]
    of_runs: Mapping[str, object]
    of_tries: Mapping[str, object]
    entries: Sequence[Entry]
    grids: Mapping[str, Grid]
    tries: Mapping[str, Sequence[Settings]]
    budget: Budget
    tune_budget: Budget
    tuning_seed: int
    seeds: Sequence[int]
    root: Path

    def config_of_try(self, entry: Entry, settings: Settings) -> RunConfig:
        """Return the configuration of one try."""
        return self._config(entry, {**settings, **self.of_tries, "seed": self.tuning_seed})

    def config_of_run(self, entry: Entry, settings: Settings, seed: int) -> RunConfig:
        """Return the configuration of one run of the chosen setting."""
        return self._config(entry, {**settings, **self.of_runs, "seed": seed})

    @property
    def num_runs(self) -> int:
        """How many runs there are; some may be finished."""
        return sum(len(tries) + len(self.seeds) for tries in self.tries.values())

    def notes(self) -> Iterator[str]:
        """Check every try and the data; yield which keys have no effect under which method.

        Raises:
            MetabloomError: for what cannot be run.
        """
        for entry in self.entries:
            for settings in self.tries[entry.name]:
                config = self.config_of_try(entry, settings)
                recipe_of(config), models_of(config)
            for key in idle_keys(config):
                if key in entry.fixed:
                    raise ConfigError(
                        f"--strategies {entry.name!r}: {key} has no effect under "
                        f"{entry.strategy}: leave it out"
                    )
                if key in self.base:
                    yield f"{key} has no effect under {entry.name}"
        federation = federation_of(self.config_of_try(self.entries[0], {}))
        if not federation.indices("validation"):
            raise ConfigError(
                f"{federation.name} has no validation client, and nothing can be chosen"
            )

    def _config(self, entry: Entry, own: Mapping[str, object]) -> RunConfig:
        return RunConfig.read({**self.base, "strategy": entry.strategy, **entry.fixed, **own})


def planned(
    values: Mapping[str, object],
    entries: Sequence[Entry],
    budget: Budget,
    *,
    seeds: int,
    out: Path,
    tune_budget: Budget | None = None,
    grid: Sequence[str] = (),
    tries: int | None = None,
) -> Plan:
    """Return what a comparison does.

    Args:
        values: keys that the user gave for all runs.
        entries: the methods.
        budget: of each run.
        seeds: how many seeds the chosen settings run with.
        out: folder of the comparison.
        tune_budget: of each try; None: that of a run.
        grid: axes in the place of the usual ones, see ``tuning.overridden``.
        tries: of each method; None: as many as the smallest grid has.

    Raises:
        ConfigError: where it cannot be carried out.
    """
    for key, option in BY_OPTION.items():
        if key in values:
            raise ConfigError(f"{key} = {values[key]!r}: a comparison sets it itself: use {option}")
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: must be at least 1")
    tuning = tune_budget or budget
    usual = {"dataset": RunConfig.defaults()["dataset"]}
    base: dict[str, object] = {**usual, **values}
    of_runs = _spent("--budget", budget, values)
    of_tries = {**_spent("--tune-budget", tuning, values), "score-unseen": False}
    for entry in entries:
        if twice := sorted(set(values) & set(entry.fixed)):
            raise ConfigError(
                f"{twice[0]} is set for all runs ({values[twice[0]]!r}) and by "
                f"--strategies {entry.name!r}: give it once"
            )
    configs = {
        one.name: RunConfig.read({**base, "strategy": one.strategy, **one.fixed, **of_tries})
        for one in entries
    }
    base |= _same_records(list(configs.values()))
    free = {one.name: keys_that_matter(configs[one.name]) - set(one.fixed) for one in entries}
    tuned = {one.name: usual_grid(one.strategy, free[one.name] - set(values)) for one in entries}
    grids = overridden(tuned, grid, free)
    if both := sorted(set(values) & set().union(*grids.values())):
        raise ConfigError(
            f"{both[0]} is set for all runs ({values[both[0]]!r}) and stands in --grid: give it "
            "once"
        )
    seed = configs[entries[0].name].seed
    return Plan(
        base,
        of_runs,
        of_tries,
        entries,
        grids,
        tries_of(grids, tries, seed),
        budget,
        tuning,
        tuning_seed=seed,
        seeds=tuple(range(seed + 1, seed + 1 + seeds)),
        root=out / TRIALS,
    )


def _spent(option: str, budget: Budget, values: Mapping[str, object]) -> dict[str, object]:
    """Return the keys with which a run spends a budget and is validated, in its last round too."""
    if budget.kind == "rounds" and "rounds" in values:
        raise ConfigError(
            f"rounds = {values['rounds']!r} beside {option} {budget}, which says how many: leave "
            "it out; with another budget it bounds the rounds"
        )
    most = int(RunConfig.read({"rounds": values.get("rounds", MOST_ROUNDS)}).rounds)
    keys: dict[str, object] = dict(budget.keys(most))
    if budget.kind == "rounds" and "eval-every" not in values:
        keys["eval-every"] = evaluated_every(int(budget.amount))
    told = {"eval-every": values["eval-every"]} if "eval-every" in values else {}
    config = RunConfig.read({**told, **keys})
    if not 0 < config.eval_every <= config.rounds:
        raise ConfigError(
            f"eval-every = {config.eval_every} with {config.rounds} rounds: no round is validated, "
            "and settings are chosen by validation: set it to 1 or more, and to no more than that"
        )
    return keys


def _same_records(configs: Sequence[RunConfig]) -> dict[str, object]:
    """Return the options of the data set with which clients have the same records in all runs.

    A method that learns from held-out records leaves fewer of them to the clients: then all do.

    Raises:
        ConfigError: where the user holds out another number, or methods need different ones.
    """
    needs = {
        one.public_size + one.distill_validation
        for one in configs
        if public_kind(one) == "held-out"
    }
    if not needs:
        return {}
    if len(needs) > 1:
        raise ConfigError(
            f"the methods hold out {sorted(needs)} records (public-size and distill-validation): "
            "clients must have the same records in all runs; set them to the same for all"
        )
    (needed,) = needs
    first = configs[0]
    held = parse_options(first.dataset_args, key="dataset-args").get("held_out")
    if held not in (None, needed):
        raise ConfigError(
            f"dataset-args = {first.dataset_args!r} holds out {held} records, public-size and "
            f"distill-validation {needed}: clients must have the same records in all runs; leave "
            "held_out out of dataset-args"
        )
    more = "" if held else f" held_out={needed}"
    return {"dataset-args": f"{first.dataset_args}{more}".strip()}


def keys_that_matter(config: RunConfig) -> set[str]:
    """Return the keys that can make a difference under a strategy, as configured."""
    some_read = {*STRATEGY_KEYS, *set().union(*NEEDED.values())}
    idle = {key_of(name) for name in some_read - keys_read(config)}
    return set(RunConfig.defaults()) - idle

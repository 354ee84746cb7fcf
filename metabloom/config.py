"""The run configuration: one frozen, checked object.

It is read once, from the command line, a TOML file or Flower's run config.

Keys are written with hyphens (``inner-lr``) wherever a user writes them; the same key is
``config.inner_lr`` in Python.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ConfigError, nearest
from .keys import Scalar, flattened, key_of

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrDefault = Annotated[int, Field(ge=0)]

DATA_ENVIRONMENT_VARIABLE = "METABLOOM_DATA"
FREE_WHEN_RESUMED = (  # keys that do not decide what a run computes, only how far, where and when
    "rounds",
    "out",
    "resume",
    "checkpoint_every",
    "checkpoints_kept",
    "state_root",
    "privacy_root",
    "data_root",
    "download",
    "timeout_s",
    "device",
)


class RunConfig(BaseModel):
    """Every key of a run, with its default, its check and a line of help.

    Raises ConfigError from ``RunConfig.read`` for an unknown key (naming the nearest) or a value
    out of range.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=key_of,
        populate_by_name=True,
        coerce_numbers_to_str=True,
    )

    strategy: str = Field("fedmeta", description="registry name of the strategy")
    dataset: str = Field("digits", description="registry name of the data set")
    dataset_args: str = Field("", description="options of the data set, e.g. 'ways=5 shots=1'")
    model: str = Field(
        "", description="registry name of the model; empty: the data set's usual one"
    )
    model_args: str = Field("", description="options of the model, e.g. 'hidden=128'")
    plugins: str = Field(
        "", description="modules with strategies, data sets or models of your own, with commas"
    )
    data_root: str = Field(
        "",
        description=f"folder of data sets; empty: {DATA_ENVIRONMENT_VARIABLE}, else ./data",
    )
    download: bool = Field(False, description="fetch a missing data set where its library can")
    out: str = Field("metabloom-results", description="folder for the results")

    rounds: Count = Field(100, description="federated rounds")
    seed: int = Field(0, ge=0, description="seed of every random stream but privacy noise")
    clients_per_round: Count = Field(8, description="training clients of a round")
    num_clients: CountOrDefault = Field(
        0, description="clients of the federation; 0: all there are"
    )

    inner_lr: Rate = Field(0.5, description="learning rate of the adaptation to a client (alpha)")
    inner_steps: Count = Field(1, description="adaptation steps inside one meta-step (K)")
    order: Literal["auto", "exact", "first", "hf"] = Field(
        "auto",
        description="meta-gradient: exact second order, first order, Hessian-free; "
        "auto: exact, and first with privacy",
    )
    outer_lr: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="rate of the meta-update (beta); 0: the strategy's usual one",
    )
    server_optimizer: Literal["sgd", "adam", "adamw", "adagrad", "rmsprop"] = Field(
        "adam",
        description="torch.optim optimiser of fedmeta's server; its state persists",
    )
    local_lr: Rate = Field(
        0.1, description="learning rate of plain local SGD (fedavg and its family)"
    )
    local_steps: Count = Field(
        1,
        description="per-fedavg: local meta-steps of a round (tau); with privacy, also the steps "
        "of local SGD",
    )
    local_epochs: Count = Field(1, description="local epochs of a round (fedavg and its family)")
    batch_size: CountOrDefault = Field(
        0, description="records of a batch; 0: all (per-fedavg's three batches then coincide)"
    )
    split: Literal["fixed", "fresh"] = Field(
        "fresh",
        description="fedmeta's support and query: the client's own sets, or a new split each step",
    )
    weighting: Literal["auto", "uniform", "examples"] = Field(
        "auto",
        description="weight of a client: the strategy's own choice, equal, or by its records",
    )
    proximal_mu: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="fedprox: mu of the proximal term"
    )
    ditto_lambda: float = Field(
        0.1,
        ge=0,
        allow_inf_nan=False,
        description="ditto: pull of the global model on the personal one",
    )
    reptile_epsilon: Rate = Field(1.0, description="reptile: step towards the clients' mean")

    aggregation: Literal["mean", "median", "trimmed-mean", "multi-krum"] = Field(
        "mean", description="how the clients' models become one; all but mean resist bad ones"
    )
    trim_beta: float = Field(
        0.2, ge=0, lt=0.5, description="trimmed-mean: share of values cut at either end"
    )
    num_malicious: CountOrDefault = Field(
        1, description="multi-krum: how many clients of a round may be malicious (f)"
    )
    num_selected: CountOrDefault = Field(
        0, description="multi-krum: how many models are averaged; 0: all but f"
    )

    min_fit_replies: Count = Field(
        1, description="good replies that a round needs; with fewer the model stays"
    )
    max_value: Rate = Field(1e20, description="firewall: largest absolute value in a reply")
    max_weight: Rate = Field(1e9, description="firewall: largest num-examples of a reply")
    max_share: float = Field(
        0.9, gt=0, le=1, description="firewall: largest share of the weights of three or more"
    )
    max_update_norm: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="firewall: largest L2 norm of an update; 0: any"
    )
    norm_action: Literal["refuse", "clip"] = Field(
        "refuse", description="firewall: what becomes of an update above max-update-norm"
    )
    max_offences: CountOrDefault = Field(
        0, description="a client with so many bad replies is not sampled again; 0: always"
    )

    resume: bool = Field(
        False, description="go on from the newest checkpoint in the results folder, if there is one"
    )
    checkpoint_every: CountOrDefault = Field(
        1, description="save the whole state every so many rounds; 0: never"
    )
    checkpoints_kept: Count = Field(3, description="checkpoints that are kept, the newest ones")
    state_root: str = Field(
        "",
        description="folder of clients' lasting state, also in a node's config; "
        "empty: clients/ in the results folder",
    )

    privacy_noise_multiplier: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="DP-SGD on the clients: standard deviation of the noise over max-grad-norm "
        "(sigma); 0: no privacy",
    )
    privacy_max_grad_norm: Rate = Field(
        1.0, description="largest L2 norm of one record's gradient (C); larger ones are clipped"
    )
    privacy_sample_rate: float = Field(
        0.1, gt=0, le=1, description="chance of each record to be in a batch (q)"
    )
    privacy_expected_batch_size: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="what sums are divided by (b): a public constant, sample-rate times a usual "
        "number of records; 0: times 100, with public-counts times the client's own",
    )
    privacy_target_epsilon: Rate = Field(
        8.0, description="a client whose ledger would come above it is exhausted"
    )
    privacy_target_delta: float = Field(
        1e-5, gt=0, lt=1, description="delta of that epsilon: well below 1 / records of a client"
    )
    privacy_accountant: Literal["rdp", "prv"] = Field(
        "rdp", description="how releases add up; prv is tighter, for schedules that never change"
    )
    privacy_hvp_noise_multiplier: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="sigma of Hessian-vector products (order = exact); 0: noise-multiplier",
    )
    privacy_hvp_max_norm: Rate = Field(
        0.1, description="largest norm of one record's Hessian-vector product over the vector's"
    )
    privacy_max_releases: Count = Field(1000, description="most releases of one client's round")
    privacy_public_counts: bool = Field(
        False, description="clients' numbers of records are no secret, and are sent"
    )
    privacy_unprotected_metrics: str = Field(
        "",
        description="evaluation metrics that private clients send as they are, with commas, "
        "without any privacy; all: every one; empty: none",
    )
    privacy_root: str = Field(
        "",
        description="folder of clients' privacy ledgers, also in a node's config; "
        "empty: ledgers/ in the results folder",
    )

    user_privacy_noise_multiplier: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="privacy of whole clients, on the server: standard deviation of the noise over "
        "max-update-norm (z); 0: off",
    )
    user_privacy_max_update_norm: Rate = Field(
        1.0, description="largest L2 norm of one client's update (C); larger ones are clipped"
    )
    user_privacy_sample_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="each client's secret chance to take part in a round (q), clients-per-round "
        "is then what sums are divided by; 0: samples of that size, and no amplification",
    )
    user_privacy_target_epsilon: Rate = Field(
        8.0, description="training ends before the clients' ledger, user-level.jsonl, is above it"
    )
    user_privacy_target_delta: float = Field(
        1e-5, gt=0, lt=1, description="delta of that epsilon: well below 1 / number of clients"
    )
    user_privacy_adaptive_quantile: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of updates that max-update-norm adapts to (gamma), privately; 0: fixed",
    )

    eval_steps: str = Field(
        "1,5", description="numbers of adaptation steps that an evaluation reports"
    )
    eval_every: CountOrDefault = Field(10, description="validate every so many rounds; 0: never")
    timeout_s: Rate = Field(3600.0, description="longest wait for the replies of a round")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where clients compute")

    @field_validator("eval_steps", mode="before")
    @classmethod
    def _eval_steps_are_counts(cls, value: object) -> str:
        parts = [part.strip() for part in str(value).split(",")]  # a lone 5 is a number in TOML
        if not all(part.isdigit() and int(part) >= 1 for part in parts):
            raise ValueError("must be counts of at least 1 with commas, e.g. '1,5'")
        return ",".join(str(step) for step in sorted({int(part) for part in parts}))

    @model_validator(mode="after")
    def _privacy_is_on_where_it_is_described(self) -> Self:
        for table, is_on, hint in (
            ("privacy", self.is_private, " ('metabloom privacy plan' says how far)"),
            ("user_privacy", self.is_user_private, ""),
        ):
            described = [
                key_of(name)
                for name, field in type(self).model_fields.items()
                if name.startswith(f"{table}_")
                and name != "privacy_root"
                and getattr(self, name) != field.default
            ]
            if described and not is_on:
                switch = key_of(f"{table}_noise_multiplier")
                what = table.replace("_", " ")
                raise ValueError(
                    f"{described[0]} is set, but {what} is off: set {switch} above 0{hint}"
                )
        return self

    @model_validator(mode="after")
    def _user_privacy_goes_with_the_mean(self) -> Self:
        if self.is_user_private and self.aggregation != "mean":
            raise ValueError(
                f"aggregation = {self.aggregation!r} with user-privacy: updates are clipped, "
                "summed and noised before anything else sees them, so it would have no effect; "
                "use 'mean'"
            )
        return self

    @property
    def is_private(self) -> bool:
        """Whether clients train with record-level privacy."""
        return self.privacy_noise_multiplier > 0

    @property
    def is_user_private(self) -> bool:
        """Whether the server clips clients' updates and adds noise: user-level privacy."""
        return self.user_privacy_noise_multiplier > 0

    @property
    def unprotected_metrics(self) -> tuple[str, ...]:
        """The metrics that private clients send as they are, by name."""
        parts = self.privacy_unprotected_metrics.split(",")
        return tuple(filter(None, (part.strip() for part in parts)))

    @property
    def adaptation_steps(self) -> tuple[int, ...]:
        """``eval_steps`` as numbers, ascending."""
        return tuple(int(part) for part in self.eval_steps.split(","))

    @property
    def data_folder(self) -> Path:
        """Where data sets lie; see the function of that name."""
        return data_folder(self.data_root)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the default of every key, hyphenated, as Flower's app config lists them."""
        return {key_of(name): field.default for name, field in cls.model_fields.items()}

    @classmethod
    def read(cls, values: Mapping[str, object]) -> Self:
        """Return the configuration that ``values`` (hyphenated keys) describe.

        Raise ConfigError naming each wrong key.
        """
        known = cls.defaults()
        wrong = [
            f"unknown configuration key {key!r}: {nearest(key, known)}"
            "'metabloom config' lists every key"
            for key in sorted(set(values) - set(known))
        ]
        wrong += [
            f"{key} = {value!r}: a number or a text is needed, not true or false"
            for key, value in values.items()
            if isinstance(value, bool) and key in known and not isinstance(known[key], bool)
        ]
        if wrong:
            raise ConfigError("\n".join(wrong))
        try:
            return cls.model_validate(dict(values))
        except ValidationError as err:
            lines = [_one_line(dict(problem)) for problem in err.errors()]
            raise ConfigError("\n".join(lines)) from err

    @classmethod
    def read_toml(cls, path: Path) -> dict[str, object]:
        """Return the keys of a TOML file as a flat mapping.

        Raise ConfigError where it is missing or not TOML.
        """
        try:
            return flattened(tomllib.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as err:
            raise ConfigError(
                f"configuration file {str(path)!r} does not exist: check the path"
            ) from err
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
            raise ConfigError(f"configuration file {str(path)!r} is not TOML: {err}") from err
        except OSError as err:
            raise ConfigError(
                f"configuration file {str(path)!r} cannot be read: {err.strerror}"
            ) from err

    def identity(self) -> dict[str, Scalar]:
        """Return the keys that decide what a run computes: a resumed run must have the same."""
        return self.model_dump(by_alias=True, exclude=set(FREE_WHEN_RESUMED))

    def to_flower(self) -> dict[str, Scalar]:
        """Return every key with its value, hyphenated, as Flower's run config holds them."""
        return self.model_dump(by_alias=True)


def data_folder(root: str = "") -> Path:
    """Return where data sets lie: ``root``, else METABLOOM_DATA of the environment, else ./data."""
    chosen = root or os.environ.get(DATA_ENVIRONMENT_VARIABLE) or "data"
    return Path(chosen).expanduser()


def _one_line(problem: dict[str, Any]) -> str:
    key = "-".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if not key:  # of the whole, which names its keys
        return str(message)
    said = message[0].lower() + message[1:]
    return f"{key} = {problem['input']!r}: {said}; 'metabloom config' says what it means"

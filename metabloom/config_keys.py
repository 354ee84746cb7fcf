"""The keys of a run that say how it is carried out: bad replies, checkpoints, privacy, machines.

Each with its default, its check and a line of help. ``metabloom.config_keys_task`` has those that
say what is computed; ``metabloom.config`` reads them all and says how they go together.
"""

from typing import Literal

from pydantic import Field

from .config_keys_task import Count, CountOrDefault, Rate, TaskKeys


class RunKeys(TaskKeys):
    """Every key of a run, in the order in which users see them."""

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
    score_unseen: bool = Field(
        True, description="after the last round unseen clients score the model; false: nobody does"
    )
    score_training: bool = Field(
        False,
        description="after the last round training clients score too, in any case; false: those "
        "alone that keep models of their own",
    )
    held_back: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of a training client's query records that no training sees: what it "
        "has at the end is judged by them; not for data whose split is fixed",
    )
    timeout_s: Rate = Field(3600.0, description="longest wait for the replies of a round")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where clients compute")

    engine: Literal["auto", "cohort", "flower"] = Field(
        "auto",
        description="what carries the messages: the simulator's cohort engine or Flower's own; "
        "auto: cohort in metabloom simulate, flower in flwr run",
    )
    workers: str = Field(
        "auto",
        description="processes in which the cohort engine runs clients: a number, 0: in that of "
        "the server; auto: one for each core (of GPUs: each GPU), and 0 below 8 clients-per-round "
        "or 2000 training replies in all, which would be over before Ray has started",
    )
    kernel: Literal["auto", "eager", "compiled", "vmap"] = Field(
        "auto",
        description="how clients compute: torch as it is, one client's step compiled, or whole "
        "cohorts at once; auto: vmap on GPUs, on CPUs compiled from 6000 local steps a worker on, "
        "eager below and under Flower's own engine",
    )
    ray_address: str = Field(
        "",
        description="Ray cluster that the workers join, auto or host:port; empty: a Ray of the "
        "run's own on this machine",
    )
    gpus_per_worker: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="share of a GPU for each worker; 0: all GPUs shared equally by the workers",
    )
    client_timeout_s: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="a client that computes for longer is given up, where workers are at least 1; "
        "0: none is",
    )

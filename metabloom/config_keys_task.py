"""The keys of a run that say what is computed: data, model, algorithm.

Each with its default, its check and a line of help; ``metabloom.config_keys`` has the others.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .keys import key_of

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrDefault = Annotated[int, Field(ge=0)]

DATA_ENVIRONMENT_VARIABLE = "METABLOOM_DATA"


class TaskKeys(BaseModel):
    """What a run computes, in the order in which users see it."""

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
    init: str = Field(
        "",
        description="trained weights to start at: a results folder, a safetensors file, or "
        "torchvision:NAME; what does not fit, usually the head, stays as the seed makes it",
    )
    init_is_public: bool = Field(
        False, description="with privacy: these weights are no secret, though not trained privately"
    )
    architectures: str = Field(
        "",
        description="several models in the place of one, shared out among the clients, e.g. "
        "'small: mlp hidden=32; cnn'; a node's own key architecture says which it has",
    )
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
    patience: CountOrDefault = Field(
        0,
        description="the run ends after so many validations without a better one, and leaves the "
        "model of the best; 0: it does not look",
    )
    max_bytes: CountOrDefault = Field(
        0, description="bytes of arrays, exchanged by training, that end the run; 0: no bound"
    )
    max_seconds: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds of its rounds that end the run; 0: no bound",
    )
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
    server_optimizer: Literal["sgd", "adam", "adamw", "adagrad", "rmsprop", "yogi"] = Field(
        "adam",
        description="optimiser of the server, whose state persists; fedmeta: torch.optim's, not "
        "yogi; fedopt: adam, yogi, adagrad and sgd of its paper",
    )
    local_lr: Rate = Field(
        0.1, description="learning rate of plain local SGD (fedavg and its family)"
    )
    local_steps: Count = Field(
        1,
        description="per-fedavg, autoregressive: local meta-steps of a round (tau); with privacy, "
        "also the steps of local SGD",
    )
    local_epochs: Count = Field(1, description="local epochs of a round (fedavg and its family)")
    batch_size: CountOrDefault = Field(
        0, description="records of a batch; 0: all (per-fedavg's three batches then coincide)"
    )
    split: Literal["fixed", "fresh"] = Field(
        "fresh",
        description="support and query of fedmeta and autoregressive: the client's own sets, or a "
        "new split each step",
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
    head: str = Field(
        "",
        description="which layers are a model's head (anil, boil, fedper, fedrep, lg-fedavg, "
        "fedbabu): the name of a layer or block, or how many of the last layers; empty: what the "
        "model calls head, else its last layer",
    )
    pfedme_lambda: Rate = Field(
        1.0,
        description="pfedme: how close a personal model stays to the shared one; the paper takes "
        "15, which needs an inner-lr well below 2 / 15",
    )
    pfedme_beta: Rate = Field(1.0, description="pfedme: step towards the clients' mean")
    reptile_epsilon: Rate = Field(
        1.0,
        description="reptile: step towards the clients' mean, or the learning rate of another "
        "optimiser than sgd",
    )
    reptile_optimizer: Literal["sgd", "adam", "adamw", "adagrad", "rmsprop"] = Field(
        "sgd", description="reptile: torch.optim optimiser of its server; its state persists"
    )
    reptile_after: CountOrDefault = Field(
        0, description="reptile: rounds of plain FedAvg before its own begin"
    )
    nova_momentum: float = Field(
        0.0, ge=0, lt=1, description="fednova: momentum of local steps, new in each round (rho)"
    )
    nova_mu: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="fednova: mu of a proximal term"
    )
    fedopt_tau: Rate = Field(
        1e-3, description="fedopt: added to root mean squares (tau); larger is less adaptive"
    )
    head_epochs: Count = Field(
        10, description="fedrep: a client's epochs on its head, before those on the body"
    )

    groups: str = Field(
        "",
        description="group-maml, group-reptile: JSON file with the group of each client by name; "
        "empty: what a client's name has before a slash (Omniglot: the alphabet); a node's own key "
        "group says its own",
    )
    group_adapt: Literal["client", "group"] = Field(
        "client",
        description="group-maml: who adapts, each client by itself or the members of a group "
        "together, in several exchanges a round",
    )
    group_rounds: Count = Field(
        1, description="group-reptile: rounds of FedAvg within a group in one round (R)"
    )
    group_size: CountOrDefault = Field(
        0, description="most members of one group in a round, drawn by chance; 0: all"
    )
    task_weight: Literal["auto", "uniform", "examples"] = Field(
        "auto", description="weight of a group: as weighting says of clients, equal, or by records"
    )

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

    public_data: str = Field(
        "",
        description="distillation: records that are no secret: held-out (of the data set), "
        "dataset:NAME, noise, smooth-noise; empty: held-out where the data set can, else noise; "
        "with privacy it must be set, which declares them public",
    )
    public_size: Count = Field(2000, description="how many public records")
    public_subset: CountOrDefault = Field(
        0, description="fedmd, ds-fl: public records of a round, drawn by chance; 0: all"
    )
    distill_validation: CountOrDefault = Field(
        0,
        description="feddf: further held-out records, whose labels the server knows: models below "
        "chance on them teach nobody, and students stop by them; 0: none",
    )
    distill_steps: Count = Field(
        500, description="steps of Adam of each of the server's students in a round"
    )
    distill_lr: Rate = Field(1e-3, description="its learning rate at first")
    distill_batch_size: Count = Field(128, description="public records of a step, at both ends")
    digest_epochs: Count = Field(
        1, description="fedmd, ds-fl: a client's epochs of SGD on what was agreed"
    )
    digest_lr: Rate = Field(0.1, description="fedmd, ds-fl: its learning rate")
    logits_encoding: Literal["float32", "float16", "int8"] = Field(
        "float32", description="fedmd, ds-fl: how logits travel, both ways"
    )
    era_temperature: Rate = Field(
        0.1, description="ds-fl: mean probabilities are divided by it (T); smaller is sharper"
    )

    mentor: str = Field(
        "", description="fedkd: the private model of each client, e.g. 'mlp hidden=400'"
    )
    energy_start: float = Field(
        0.95, gt=0, le=1, description="fedkd: share of an update's energy that is sent at first"
    )
    energy_end: float = Field(0.98, gt=0, le=1, description="fedkd: that share in the last round")

    teacher: str = Field(
        "",
        description="teacher-student, meta-teacher: results folder of the run that trained it, or "
        "a safetensors file",
    )
    teacher_model: str = Field(
        "",
        description="the teacher's model, e.g. 'cnn' or 'mlp hidden=400'; empty: as its run says",
    )
    teacher_is_public: bool = Field(
        False,
        description="with privacy: the teacher is no secret of the clients, though not trained "
        "privately",
    )
    distill_alpha: float = Field(
        0.5, ge=0, le=1, description="share of the teacher in a student's loss on a client"
    )
    distill_temperature: Rate = Field(
        4.0, description="temperature of the teacher's and the student's outputs in that share (T)"
    )
    teacher_steps: CountOrDefault = Field(
        0,
        description="meta-teacher: gradient steps that adapt the teacher to a client; 0: the last "
        "of eval-steps. What it was trained for is usually best",
    )
    teach_steps: Count = Field(
        100, description="meta-teacher: steps in which a client's student learns from the teacher"
    )
    teach_lr: Rate = Field(0.01, description="meta-teacher: learning rate of these steps")

    hypernetwork_width: Count = Field(
        128,
        description="autoregressive: width of the generator's state; pfedhn: of the hypernetwork's "
        "hidden layers",
    )
    embedding_size: Count = Field(32, description="pfedhn: numbers of a client's embedding")
    hypernetwork_adapts: Literal["model", "embedding"] = Field(
        "model",
        description="pfedhn: what a client adapts when it is evaluated: its generated model, or "
        "its embedding alone, for which it is sent the hypernetwork",
    )

r"""User-level differential privacy on the server: a model tells little of any one client.

    x = w + (1 / m) [ sum_i clip_C(w_i - w) + N(0, z^2 C^2 I) ],   clip_C(u) = u min(1, C / ||u||)

(DP-FedAvg, McMahan et al., 1710.06963), over all floating arrays together, in float64. m is a fixed
public number, never the number of replies; weights of clients are ignored. The rule of a strategy
gets x as its one reply, so that all it does, Adam included, is post-processing: one mechanism for
every strategy. A round without replies releases noise all the same, and is booked.

What is protected is what the models tell. The server sees each update, and who took part; so does
whoever reads the results of the run. Who is connected is taken to be public.

**With a sample rate q**: each client takes part by itself with chance q, drawn from the operating
system's entropy: a seed that is known would void the amplification. Adjacency: one client added or
removed. A round is the event (z, q) of a Poisson sample.

**Without**: a sample of fixed size, drawn by the run's seed. It is no Poisson sample, and to leave
a client out would let another one in, so the adjacency is weaker: the sample stays, and one
client's answers are left out. No amplification is claimed: a round is the event (z, 1).

With an adaptive norm (Andrew et al., 1905.03871) the noisy share b of updates within C moves it,
C <- C exp(-eta (b - gamma)); the updates then get the noise z_u = (z^-2 - (2 sigma_b)^-2)^-1/2, so
that both together cost z: (b_i - 1/2) has sensitivity 1/2 where an answer is left out. It would be
1 if the answer were replaced by an update of zero.

Noise is of floating-point numbers, with the caveats of Mironov (2012). ``STATISTICS`` of BatchNorm
get noise as all else does; a variance is kept at 0 or above.
"""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ..accounting import Budget, Event, check_delta, check_events
from ..errors import ConfigError
from ..keys import Scalar
from ..ledger import PrivacyLedger
from ..wire import NamedArrays
from .rules import Arrays, Reply, Rule, State, is_floating

ADDED = "one client, added or removed"
LEFT_OUT = "one client, its answers left out"
LEDGER = Path("metabloom-ledgers") / "user-level.jsonl"
FARTHEST = 1e6  # an adaptive norm stays within this factor of the first one
_NORM = "max_update_norm"
_VARIANCE = "running_var"  # of BatchNorm: a negative one makes NaN
_FREE = ("ledger", "seed")  # a resumed run may have others


@dataclass(frozen=True, kw_only=True)
class UserLevelPrivacy:
    """Parameters of user-level privacy, all of them public; see the module's text.

    Attributes:
        noise_multiplier: z > 0.
        max_update_norm: C > 0, largest L2 norm of a client's update w_i - w; the first one where
            it adapts.
        expected_clients: m > 0, by which sums are divided: best the sample rate times the number of
            clients, or the size of the sample. A public constant.
        target_delta: in (0, 1), well below 1 / (number of clients).
        sample_rate: q in (0, 1], each client's chance to take part in a round; None: a sample of
            fixed size, and no amplification.
        target_epsilon: > 0; no round that would bring the ledger above it; None: any.
        adaptive_quantile: gamma in (0, 1), the share of updates that shall be within the norm;
            None: the norm is fixed.
        adaptive_lr: eta > 0.
        count_noise: sigma_b, standard deviation of the noise of the number of updates within the
            norm, above z / 2; None: m / 20, or z where that is more.
        ledger: the file, or a PrivacyLedger, of all releases on these clients;
            None: ``metabloom-ledgers/user-level.jsonl`` in the working directory.
        seed: of noise and of the Poisson sample, for tests only: seeded noise protects nobody, and
            the ledger says that it was seeded. None: the operating system's entropy.

    Raises:
        ConfigError: where a value is out of range, naming it.
    """

    noise_multiplier: float
    max_update_norm: float
    expected_clients: float
    target_delta: float
    sample_rate: float | None = None
    target_epsilon: float | None = None
    adaptive_quantile: float | None = None
    adaptive_lr: float = 0.2
    count_noise: float | None = None
    ledger: PrivacyLedger | Path | str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_events([self.event])
        check_delta(self.target_delta, "target_delta")
        if self.target_epsilon is not None:
            Budget(self.target_epsilon, self.target_delta)
        for name in ("max_update_norm", "expected_clients", "adaptive_lr", "count_noise"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value!r}: must be a finite number above 0")
        if self.adaptive_quantile is None:
            return
        if not 0 < self.adaptive_quantile < 1:
            raise ConfigError(
                f"adaptive_quantile = {self.adaptive_quantile!r}: must lie between 0 and 1, e.g. "
                "0.5 for the median"
            )
        if not 2 * self.sigma_b > self.noise_multiplier:
            raise ConfigError(
                f"count_noise = {self.sigma_b!r}: the count of updates alone would cost more than "
                f"noise_multiplier = {self.noise_multiplier!r} allows; take more than half of it"
            )

    @property
    def event(self) -> Event:
        """What a round is in the ledger."""
        return Event(self.noise_multiplier, 1.0 if self.sample_rate is None else self.sample_rate)

    @property
    def budget(self) -> Budget | None:
        """What may be spent on the clients, over all runs of the ledger; None: anything."""
        if self.target_epsilon is None:
            return None
        return Budget(self.target_epsilon, self.target_delta)

    @property
    def unit(self) -> str:
        """What is protected: the adjacency; see the module's text."""
        return ADDED if self.event.sample_rate < 1 else LEFT_OUT

    @property
    def sigma_b(self) -> float:
        """Standard deviation of the noise of the number of updates within the norm."""
        usual = max(self.expected_clients / 20, self.noise_multiplier)
        return usual if self.count_noise is None else self.count_noise

    @property
    def update_noise(self) -> float:
        """z_u, the noise of the sum of updates over C; z where the norm is fixed."""
        z = self.noise_multiplier
        if self.adaptive_quantile is None:
            return z
        return z / math.sqrt(1 - (z / (2 * self.sigma_b)) ** 2)

    @property
    def settings(self) -> dict[str, Scalar]:
        """What a run that is resumed must have been begun with."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FREE}
        return {f"user_privacy.{name}": one for name, one in told.items() if one is not None}


def fresh_generator() -> np.random.Generator:
    """Return a generator that nobody can know: key and counter come from the operating system."""
    return np.random.Generator(
        np.random.Philox(key=secrets.randbits(128), counter=secrets.randbits(256))
    )


def clipped_update(
    arrays: NamedArrays, sent: NamedArrays, max_norm: float
) -> tuple[Arrays, bool] | None:
    """Return u min(1, C / ||u||) of u = w_i - w, and whether ||u|| <= C.

    Args:
        arrays: w_i.
        sent: w; the floating arrays are taken, all of them together.
        max_norm: C > 0.

    Returns:
        Float64 arrays of norm at most C, whatever ``arrays`` hold; None where u is not finite: what
        is left out has norm 0.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        update = {
            name: np.asarray(np.subtract(arrays[name], value, dtype=np.float64))
            for name, value in sent.items()
            if is_floating(value)
        }
        peaks = [float(np.abs(one).max(initial=0.0)) for one in update.values()]
        if not all(map(math.isfinite, peaks)):  # max() would lose a NaN
            return None
        peak = max(peaks, default=0.0)
        if not peak:
            return update, True
        # Over the peak first: squares of 1e200 overflow, those of 1e-200 vanish.
        scaled = {name: one / peak for name, one in update.items()}
        norm = math.sqrt(sum(float(np.vdot(one, one)) for one in scaled.values()))
        if peak * norm <= max_norm:
            return update, True
        return {name: one * (max_norm / norm) for name, one in scaled.items()}, False


def clipped_sum(
    sent: NamedArrays, replies: Sequence[Reply], max_norm: float
) -> tuple[Arrays, float]:
    """Return sum_i clip_C(w_i - w) in float64, and sum_i (b_i - 1/2) with b_i = 1[||u_i|| <= C].

    Without one reply the first differs by at most C in norm, the second by at most 1/2.
    """
    total = {name: np.zeros(value.shape) for name, value in sent.items() if is_floating(value)}
    count = 0.0
    for reply in replies:
        found = clipped_update(reply.arrays, sent, max_norm)
        if found is None:
            continue
        update, is_within = found
        for name, value in update.items():
            total[name] += value
        count += 0.5 if is_within else -0.5
    return total, count


def released(
    sent: NamedArrays,
    replies: Sequence[Reply],
    privacy: UserLevelPrivacy,
    max_norm: float,
    generator: np.random.Generator,
) -> tuple[Arrays, float]:
    """Return x, the one release of a round, and the norm C of the next round.

    Args:
        sent: w.
        replies: of any number of clients, none included.
        privacy: z, m and how C adapts.
        max_norm: C of this round.
        generator: of the noise, used for nothing else; see ``fresh_generator``.

    Returns:
        Float64 for floating arrays, those of ``sent`` for others; C as it was where it is fixed.
    """
    total, count = clipped_sum(sent, replies, max_norm)
    std, m = privacy.update_noise * max_norm, privacy.expected_clients
    arrays: Arrays = dict(sent)
    for name, value in total.items():
        noisy = value + std * generator.standard_normal(value.shape)
        arrays[name] = np.asarray(sent[name] + noisy / m, dtype=np.float64)
        if name.endswith(_VARIANCE):
            arrays[name] = np.maximum(arrays[name], 0.0)
    if privacy.adaptive_quantile is None:
        return arrays, max_norm
    share = 0.5 + (count + privacy.sigma_b * generator.standard_normal()) / m
    return arrays, next_norm(privacy, max_norm, share)


def next_norm(privacy: UserLevelPrivacy, max_norm: float, share: float) -> float:
    """Return C exp(-eta (b - gamma)) of the noisy ``share`` b, within bounds that are public."""
    quantile = privacy.adaptive_quantile
    if quantile is None:
        return max_norm
    moved = math.log(max_norm) - privacy.adaptive_lr * (share - quantile)
    first, farthest = math.log(privacy.max_update_norm), math.log(FARTHEST)
    return math.exp(min(max(moved, first - farthest), first + farthest))


def with_user_privacy(
    rule: Rule, privacy: UserLevelPrivacy, noise: Callable[[], np.random.Generator]
) -> Rule:
    """Return ``rule`` on the one noisy reply x of a round in place of the clients' replies.

    Its state holds that of ``rule`` and the norm, so that a checkpoint has both.

    Args:
        rule: any; an aggregation other than the mean has no effect on one reply.
        privacy: the parameters.
        noise: gives the generator of a round once the release is paid for; it may raise.
    """

    def init(arrays: NamedArrays) -> State:
        return {"rule": rule.init(arrays), _NORM: float(privacy.max_update_norm)}

    def update(state: State, sent: NamedArrays, replies: Sequence[Reply]) -> tuple[State, Arrays]:
        arrays, norm = released(sent, replies, privacy, norm_in(state), noise())
        inner, new = rule.update(state["rule"], sent, [Reply(arrays, num_examples=1.0)])
        return {"rule": inner, _NORM: norm}, new

    return Rule(init=init, update=update)


def norm_in(state: State) -> float:
    """Return C of the next round, of a state of ``with_user_privacy``."""
    return float(state[_NORM])

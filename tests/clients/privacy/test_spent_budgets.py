"""At its target a private client trains no more, says so by a constant, and goes on for itself."""

import numpy as np
import pytest

from metabloom.accounting import Event, epsilon_of
from metabloom.clients import ClientStore, MAMLClient, SGDClient
from metabloom.errors import (
    BUDGET_EXHAUSTED,
    BudgetExhaustedError,
)
from tests.clients.privacy.private_clients import (
    Loader,
    ask,
    booked,
    bytes_of,
    private,
    reason_of,
    served,
)
from tests.clients.small_clients import client_data, context

KINDS = pytest.mark.parametrize("kind", [MAMLClient, SGDClient])
CANARY = "diagnosis of record 7: 123456.789"


# --- the end of the budget ------------------------------------------------------------------------

FEW = {"target_epsilon": 12.0}  # of sigma = 1 and q = .5: some rounds


def exhaust(file, **options) -> int:
    """Train until the budget is spent; return the number of the first round that was refused."""
    for number in range(1, 100):
        own = private(file, pins=FEW, **options)
        try:
            own.fit(own.get_parameters({}), {"server-round": number})
        except BudgetExhaustedError:
            return number
    raise AssertionError("the budget does not end")


def test_at_the_target_the_answer_is_a_constant_and_data_are_not_touched(file):
    number = exhaust(file)
    assert number > 2
    content, data = file.read_bytes(), Loader()
    reply = served(file, pins=FEW, data=data).ask("train", number=number)
    assert reason_of(reply) == f"BudgetExhaustedError: {BUDGET_EXHAUSTED}"
    assert data.calls == 0
    assert file.read_bytes() == content
    assert epsilon_of([Event(1.0, 0.5, booked(file))], 1e-5) <= 12.0


def test_the_answer_at_the_target_is_the_same_for_other_data(file, tmp_path):
    number = exhaust(file)
    other = client_data(9, 4, seed=5)
    replies = [
        served(file, pins=FEW, data=Loader(data)).ask("train", number=number)
        for data in (None, other)
    ]
    assert replies[0].error == replies[1].error


def test_an_answer_that_was_paid_for_is_given_after_the_end(file):
    """It costs nothing to send it again."""
    start = private(file).get_parameters({})
    first = private(file, pins=FEW).fit(start, {"server-round": 1, "kept-round": 0})
    number = exhaust(file)
    late = {"server-round": number - 1, "kept-round": 0}
    again = private(file, pins=FEW).fit(start, late)
    assert again[2]["privacy-epsilon"] > first[2]["privacy-epsilon"]
    with pytest.raises(BudgetExhaustedError):
        private(file, pins=FEW).fit(start, {"server-round": number, "kept-round": 0})


def test_an_evaluation_goes_on_after_the_end(file):
    exhaust(file)
    reply = served(file, pins={**FEW, "unprotected_metrics": ("loss",)}).ask("evaluate")
    assert dict(reply.content["metrics"])["loss"] > 0


def test_ditto_s_personal_model_goes_on_after_the_end(file):
    held = context()
    ditto = {"kind": SGDClient, "ditto_lambda": 0.1, "context": held}
    number = exhaust(file, **ditto)
    names = [name for name in held.state if name == "metabloom.personal"]
    assert names
    before = {n: v.numpy().copy() for n, v in held.state["metabloom.personal"].items()}
    for later in (number + 1, number + 2):
        own = private(file, pins=FEW, **ditto)
        with pytest.raises(BudgetExhaustedError):
            own.fit(own.get_parameters({}), {"server-round": later})
        after = {n: v.numpy().copy() for n, v in held.state["metabloom.personal"].items()}
        assert not any(np.array_equal(before[n], after[n]) for n in before)
        before = after


def test_ditto_s_personal_model_outlives_a_message_that_failed_in_a_store(file, tmp_path):
    """Flower discards what a client that raised wrote into its context."""
    store = ClientStore(tmp_path / "clients")
    ditto = {"kind": SGDClient, "ditto_lambda": 0.1, "store": store}
    number = exhaust(file, **ditto, context=context())
    reply = served(file, pins=FEW, **ditto).ask("train", number=number + 1)
    assert reason_of(reply).endswith(BUDGET_EXHAUSTED)
    kept = [path.name for path in (tmp_path / "clients").rglob("*.safetensors")]
    assert f"round-{number + 1:08d}.safetensors" in kept


def test_a_personal_model_that_fails_after_the_end_says_nothing(file):
    ditto = {"kind": SGDClient, "ditto_lambda": 0.1}
    number = exhaust(file, **ditto, context=context())
    reply = served(file, pins=FEW, data=Loader(error=ValueError(CANARY)), **ditto).ask(
        "train", number=number + 1
    )
    assert CANARY.encode() not in bytes_of(reply)


@KINDS
def test_a_first_round_above_the_target_is_told_as_such_before_data_are_touched(file, kind):
    data = Loader()
    reply = ask(file, "train", kind=kind, data=data, pins={"target_epsilon": 0.5})
    assert reason_of(reply).startswith("RefusedError: one round costs epsilon = ")
    assert "above the target of 0.5: raise privacy.noise-multiplier" in reason_of(reply)
    assert data.calls == 0
    assert not file.exists()

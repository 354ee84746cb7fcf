"""What runs in a Ray actor: one ClientApp, and what was sent to it last."""

import os
import threading
from collections import OrderedDict

from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from .parcels import (
    PackedArrays,
    Report,
    Request,
    Settings,
    pack_answer,
    unpack_arrays,
    unpack_question,
)
from .questions import Reducer
from .runner import Runner

RECORDS_KEPT = 4  # broadcasts: that of the round, of the one before, and of an evaluation


class Worker:
    """Answer blocks of questions, one block after another.

    Args:
        app: the ClientApp of every node.
        settings: what nodes have in common.
        folder: the driver's working folder, where there is one of that name here: paths in the
            configuration may be relative.
        environment: variables of the driver that are not set here.
    """

    def __init__(
        self, app: ClientApp, settings: Settings, folder: str, environment: dict[str, str]
    ) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)
        for key, value in environment.items():
            os.environ.setdefault(key, value)
        self._settings = settings
        self._runner = Runner(app)
        self._lock = threading.Lock()
        self._begun = 0  # the number of the last request
        self._skipped: set[int] = set()
        self._records: OrderedDict[str, ArrayRecord] = OrderedDict()  # by token; used last: last

    def ready(self) -> int:
        """Return the id of this process: it has started."""
        return os.getpid()

    def answer(
        self, request: Request, reducer: Reducer | None, *shared: PackedArrays
    ) -> Report | None:
        """Return the answers to a block, and its part; None where it was to be skipped."""
        with self._lock:
            if request.number in self._skipped:
                self._skipped.remove(request.number)
                return None
            self._begun = request.number
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = request.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        records = [
            self._record(token, packed)
            for token, packed in zip(request.shared, shared, strict=True)
        ]
        questions = [
            unpack_question(one, request.run_id, self._settings, records)
            for one in request.questions
        ]
        answers, part = self._runner.answers(questions, reducer)
        return Report(tuple(map(pack_answer, answers)), part)

    def skip(self, number: int) -> bool:
        """Return whether a request was not begun: then it never is. Called while another one is."""
        with self._lock:
            if number <= self._begun:
                return False
            self._skipped.add(number)
            return True

    def in_progress(self) -> list[tuple[str, float]]:
        """Return the ids of questions that were begun and not answered, with seconds since then.

        Called while ``answer`` runs.
        """
        return self._runner.in_progress()

    def _record(self, token: str, packed: PackedArrays) -> ArrayRecord:
        """Return a record, the same object to every client that it was sent to."""
        record = self._records.pop(token, None)
        if record is None:
            record = unpack_arrays(packed)
        self._records[token] = record
        while len(self._records) > RECORDS_KEPT:
            self._records.popitem(last=False)
        return record

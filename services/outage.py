"""What a search tool does while the service behind it fails: go on, then wait, then end the run.

A search that failed is an observation that says so, and nothing is learned from it. Several
failures in a row say that the service is down, and every further search would be lost. So the tool
waits, longer each time, and asks again for what had failed. A service that has never answered is
not waited for: its address is wrong.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from common.errors import OutageError, UserError
from common.progress import tqdm
from services.http import PoliteSession, one_line

Answer = TypeVar("Answer")

FAILED_TEXT = "The search failed."
FAILURES_IN_A_ROW = 8  # from so many on, a service that has answered before is down
FIRST_FAILURES = 3  # the same for one that has never answered
WAITS = (10.0, 30.0, 60.0, 120.0, 240.0)  # seconds before it is asked again, and again ..


class Outage:
    """The failures of one service; several threads may count them."""

    def __init__(
        self, session: PoliteSession, service: str, never_answered: str, way_out: str
    ) -> None:
        """Begin without a failure.

        session: what asks the service.
        service: its name in messages.
        never_answered: what to do where it has never answered.
        way_out: what to do where it is down for long; how a script goes on, run_guarded adds.
        """
        self.session = session
        self.service = service
        self.never_answered = never_answered
        self.way_out = way_out
        self.lock = threading.Lock()
        self.failures = 0  # in all
        self.last_fault = ""
        self._failures_in_a_row = 0
        self._waits_in_a_row = 0
        self._asks_again = False  # it is down, and asked whether it still is

    def count_answer(self) -> None:
        """Note that the service answered."""
        with self.lock:
            self._failures_in_a_row = 0
            self._waits_in_a_row = 0

    def count_failure(self, fault: str) -> None:
        """Note what the service did instead of answering, in spite of several tries."""
        with self.lock:
            self.failures += 1
            self._failures_in_a_row += 1
            self._asks_again = False
            self.last_fault = one_line(fault)

    @property
    def is_down(self) -> bool:
        """Whether so many searches in a row failed that it's no use to go on."""
        with self.lock:
            limit = FAILURES_IN_A_ROW if self.session.has_answered else FIRST_FAILURES
            return self._failures_in_a_row >= limit and not self._asks_again

    def ask(
        self,
        queries: list[str],
        search: Callable[[list[str]], list[Answer | None]],
    ) -> list[Answer | None]:
        """Return what a search says to each query; what fails in an outage is asked again.

        search: returns None for each query that failed. It asks for nothing while `is_down`.
        Raises OutageError where the service stays down, UserError where it never answered.
        """
        answers = search(queries)
        while self.is_down:
            self._wait()
            failed = [number for number, answer in enumerate(answers) if answer is None]
            # Back to front: an early one may have failed for a reason of its own, and would say
            # that the service is still down.
            failed.reverse()
            new_answers = search([queries[number] for number in failed])
            for number, answer in zip(failed, new_answers, strict=True):
                answers[number] = answer
        return answers

    def _wait(self) -> None:
        """Say why, and sleep; raise OutageError where that was of no use before."""
        if not self.session.has_answered:
            raise UserError(f"{self.service}: {self.last_fault}; {self.never_answered}")
        failures = (
            f"{self.service}: {self._failures_in_a_row} failures in a row, "
            f"the last one: {self.last_fault}"
        )
        if self._waits_in_a_row == len(WAITS):
            minutes = sum(WAITS) / 60
            raise OutageError(f"{failures}; {minutes:.0f} minutes did not help; {self.way_out}")
        seconds = WAITS[self._waits_in_a_row]
        tqdm.write(f"{failures}; asking again in {seconds:.0f} s")
        time.sleep(seconds)
        self._waits_in_a_row += 1
        self._asks_again = True

    def report(self) -> str:
        """Return how many searches failed, and why the last one did."""
        if not self.failures:
            return "0 failed"
        return f"{self.failures:,} failed, the last one: {self.last_fault}"

"""The writer that deliveries and the collector share: which states it goes through, and what each lets happen."""

from __future__ import annotations

import os
import threading
import time

import pytest

from attnhook.sinks.writer import State, Writer

PATIENCE = 60.0  # seconds for what takes milliseconds, unless the machine is busy


class Numbers(Writer[int]):
    """Writes numbers, three at once; can be held up, told to leave a batch unwritten, and broken."""

    def __init__(self, *, held: bool = False) -> None:
        super().__init__("numbers")
        self.written: list[int] = []
        self.calls: list[str] = []
        self.states: list[State] = []
        self.lost: list[int] = []
        self.refusing = False
        self.error: BaseException | None = None
        self.entered, self.let_go = threading.Event(), threading.Event()
        if not held:
            self.let_go.set()

    def put(self, *numbers: int) -> None:
        self.queue.extend(numbers)
        if not self.awake:
            self.wake()

    def take(self) -> threading.Event | None:
        while self.queue and len(self.batch) < 3:
            item = self.queue.popleft()
            if isinstance(item, threading.Event):
                return item
            self.batch.append(item)
        return None

    def deliver(self) -> bool:
        self.entered.set()
        assert self.let_go.wait(2 * PATIENCE)
        if self.error is not None:
            raise self.error
        if self.refusing:
            return False
        self.written += self.batch
        self.states.append(self.state)
        return True

    def flush(self) -> None:
        self.calls.append("flush")

    def finish(self) -> None:
        self.calls.append("finish")
        self.states.append(self.state)

    def ended(self) -> None:
        self.calls.append("ended")
        self.states.append(self.state)

    def given_up(self, lost: int) -> None:
        self.lost.append(lost)


def in_time() -> float:
    return time.monotonic() + PATIENCE


def without_its_thread(writer: Numbers) -> None:
    assert writer._thread is not None
    writer._thread.join(PATIENCE)
    assert not writer.alive


def test_a_writer_goes_down_the_list_of_its_states():
    writer = Numbers()
    assert writer.state is State.IDLE and not writer.alive
    writer.put(*range(7))  # before its thread runs
    assert writer.state is State.IDLE and not writer.written
    writer.start()
    assert writer.state is State.RUNNING
    assert writer.wait(writer.barrier(), in_time())
    assert writer.written == list(range(7)) and writer.calls == ["flush"]
    writer.put(7)
    writer.end()
    writer.join(in_time(), PATIENCE)
    assert writer.state is State.DONE and not writer.alive
    assert writer.written == list(range(8))
    assert writer.calls == ["flush", "flush", "finish", "ended"]
    assert writer.states[:3] == [State.RUNNING] * 3 and writer.states[-2:] == [State.STOPPING, State.DONE]
    assert list(State) == sorted(State) == [State.IDLE, State.RUNNING, State.STOPPING, State.GIVEN_UP, State.DONE]


def test_what_is_done_stays_done():
    writer = Numbers()
    writer.start()
    writer.end()
    writer.join(in_time(), PATIENCE)
    writer.end()
    writer.join(in_time(), PATIENCE)
    assert writer.state is State.DONE and writer.calls.count("finish") == 1
    assert writer.barrier().is_set()


def test_one_that_is_given_up_may_be_done_after_all():
    writer = Numbers(held=True)
    writer.put(1, 2, 3, 4, 5)
    writer.start()
    assert writer.entered.wait(PATIENCE)
    barrier = writer.barrier()
    writer.end()
    writer.join(0.0, PATIENCE)
    assert writer.state is State.GIVEN_UP and writer.lost == [2]  # the barrier is no item
    assert not writer.wait(barrier, in_time())  # nobody waits for it any longer
    writer.end()
    assert writer.state is State.GIVEN_UP
    writer.let_go.set()
    assert writer.wait(writer.barrier(), in_time())
    assert writer.state is State.DONE and writer.written == [1, 2, 3]


def test_without_a_thread_whoever_waits_writes():
    writer = Numbers()
    writer.put(1, 2)
    writer.end()
    assert writer.state is State.STOPPING
    writer.join(in_time(), PATIENCE)
    assert writer.state is State.DONE and writer.written == [1, 2] and writer.calls[-2:] == ["finish", "ended"]


def test_a_batch_that_is_left_unwritten_ends_the_thread_and_is_still_there():
    writer = Numbers()
    writer.refusing = True
    writer.put(*range(5))
    writer.start()
    writer.end()
    without_its_thread(writer)
    assert writer.state is State.DONE and writer.calls == ["finish", "ended"]
    assert (writer.batch, list(writer.queue), writer.written) == ([0, 1, 2], [3, 4], [])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_that_nothing_survives_ends_the_thread_which_can_be_seen():
    writer = Numbers()
    writer.error = LookupError("broken")
    writer.put(1)
    writer.start()
    barrier = writer.barrier()
    assert not writer.wait(barrier, in_time()) or barrier.is_set()
    without_its_thread(writer)
    assert writer.state is State.RUNNING and writer.calls == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_what_a_child_inherits_it_neither_writes_nor_closes():
    writer = Numbers(held=True)
    writer.put(1, 2)
    writer.start()
    assert writer.entered.wait(PATIENCE)
    child = os.fork()
    if child == 0:
        try:
            writer.after_fork()
            assert writer.state is State.IDLE and not writer.queue and not writer.batch
            writer.end()
            writer.join(in_time(), PATIENCE)
            assert writer.state is State.DONE and writer.calls == [] and writer.written == []
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    writer.let_go.set()
    writer.end()
    writer.join(in_time(), PATIENCE)
    assert writer.written == [1, 2] and writer.calls == ["flush", "finish", "ended"]

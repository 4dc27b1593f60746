"""SIGTERM and SIGHUP write what is queued, end the process by the signal, in time, and leave others' handlers alone."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from attnhook.sinks.delivery import Delivery
from attnhook.sinks.memory import MemorySink
from tests.helpers import python
from tests.sinks.test_delivery import finish, start, written

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out"


def signalled(process: subprocess.Popen[str], number: int = signal.SIGTERM, times: int = 1) -> tuple[int, str, float]:
    """Return code, standard error, and the seconds from the signal to the end."""
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for _ in range(times):
        process.send_signal(number)
    code, _, err = finish(process)
    return code, err, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("waits", ["time.sleep(60)", "threading.Event().wait()", "sum(1 for _ in iter(int, 1))"])
def test_what_is_queued_is_written_and_the_signal_ends_the_process(path, number, waits):
    process = start(
        path,
        f"""
        delivery = Delivery({{"slow": Lines(PATH, 0.002)}})
        other = Delivery({{"fine": Lines(PATH + "2")}})
        for first in range(0, 200, 20):
            delivery.put(records(first, first + 20))
        other.put(records(7))
        print("ready", flush=True)
        {waits}
        """,
    )
    code, err, _ = signalled(process, number)
    assert (code, err) == (-number, "")
    assert written(path) == list(range(200))
    assert written(path.with_name("out2")) == list(range(7))


@pytest.mark.slow
def test_a_second_signal_is_no_haste(path):
    """`timeout` sends it to the process and to its group."""
    process = start(
        path,
        """
        delivery = Delivery({"slow": Lines(PATH, 0.005)})
        delivery.put(records(200))
        print("ready", flush=True)
        time.sleep(60)
        """,
    )
    code, _, _ = signalled(process, times=3)
    assert code == -signal.SIGTERM
    assert written(path) == list(range(200))


@pytest.mark.slow
def test_a_sink_that_hangs_is_left_and_the_others_are_written(path):
    process = start(
        path,
        """
        from attnhook.system import termination
        termination.GRACE_SECONDS = 1.0
        class Hung(Lines):
            def close(self):
                time.sleep(60)
        Delivery({"hung": Lines(PATH + "2", 60)}).put(records(5))
        Delivery({"never used": Hung(PATH + "3")})
        Delivery({"fine": Lines(PATH)}).put(records(5))
        print("ready", flush=True)
        time.sleep(60)
        """,
    )
    code, err, seconds = signalled(process)
    assert code == -signal.SIGTERM, err
    assert written(path) == list(range(5))
    assert seconds < 10


@pytest.mark.slow
def test_a_signal_in_the_middle_of_put_loses_nothing_and_waits_for_no_lock(tmp_path):
    for attempt in range(5):
        out = tmp_path / f"out{attempt}"
        process = start(
            out,
            """
            delivery = Delivery({"lines": Lines(PATH)}, queue_size=10**9)
            count = os.open(PATH + ".count", os.O_WRONLY | os.O_CREAT)
            print("ready", flush=True)
            for done in range(10**9):
                delivery.put([record(done)])
                os.pwrite(count, b"%d" % (done + 1), 0)
                if done % 100 == 99:
                    time.sleep(0.01)  # not faster than a busy machine's disk: what waits then is soon written
            """,
        )
        time.sleep(0.03 * attempt)
        code, err, seconds = signalled(process)
        assert code == -signal.SIGTERM, err
        assert seconds < 4.5
        found = written(out)
        assert found == list(range(len(found)))
        # one more than counted, where the signal came between the two
        assert len(found) - int(out.with_name(out.name + ".count").read_text() or 0) in (0, 1)


@pytest.mark.slow
def test_a_forked_child_and_a_pool_end_so_too(path):
    process = start(
        path,
        """
        import multiprocessing
        def child():
            delivery.put(records(100))
            print("ready", flush=True)
            time.sleep(60)
        delivery = Delivery({"slow": Lines(PATH, 0.02)})  # two seconds of work
        context = multiprocessing.get_context("fork")
        process = context.Process(target=child)
        process.start()
        time.sleep(0.5)
        process.terminate()
        process.join()
        print(process.exitcode)
        with context.Pool(2) as pool:
            print(pool.map(abs, [-1, 2]))
        """,
    )
    code, out, err = finish(process)
    assert code == 0, err
    assert out.splitlines() == ["ready", "-15", "[1, 2]"]
    assert written(path) == list(range(100))


def test_a_handler_that_the_script_had_or_sets_stays_its_own(path):
    for order in ("before", "after"):
        code = """
            def handler(*_):
                print("the script's own", flush=True)
                sys.exit(3)
            if ORDER == "before":
                signal.signal(signal.SIGTERM, handler)
            delivery = Delivery({"lines": Lines(PATH)})
            if ORDER == "after":
                signal.signal(signal.SIGTERM, handler)
            delivery.put(records(5))
            assert signal.getsignal(signal.SIGTERM) is handler
            print("ready", flush=True)
            time.sleep(60)
            """
        process = start(path.with_name(order), code.replace("ORDER", repr(order)))
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        returncode, out, err = finish(process)
        assert (returncode, out) == (3, "the script's own\n"), err
        assert written(path.with_name(order)) == list(range(5))


def test_a_handler_that_ignores_stays_too_and_ours_goes_with_the_last_delivery():
    """In a process of its own, which has no other deliveries."""
    done = python(
        "-c",
        """
        import signal
        from attnhook.system import termination
        from attnhook.sinks.delivery import Delivery
        from attnhook.sinks.memory import MemorySink

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        sinks = [MemorySink(), MemorySink()]
        for sink in sinks:
            sink.open("")
        first, second = (Delivery({"memory": sink}) for sink in sinks)
        assert signal.getsignal(signal.SIGTERM) is termination._handle
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        first.close()
        assert signal.getsignal(signal.SIGTERM) is termination._handle
        second.close()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        print("done")
        """,
    )
    assert done.stdout.strip() == "done", done.stderr


def test_in_another_thread_nothing_is_set():
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        sink = MemorySink()
        sink.open("")
        with Delivery({"memory": sink}):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]

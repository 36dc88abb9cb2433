"""Signals that ask a run to end: taken at once, passed on to other ranks, and not to children."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psutil
import pytest
from distributed_helper import run_ranks

from megatron_hdpo.parallel.stop_request import StopRequest, StopRequested, signals_taken


class Taken:
    """A request whose signals are taken in this process; what it said, and the signals that ended it "at once"."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.ended: list[tuple[signal.Signals, bool]] = []
        self.request = StopRequest(lambda number, has_begun: self.ended.append((number, has_begun)))

    def send(self, number: signal.Signals, seen: Callable[[], bool]) -> None:
        os.kill(os.getpid(), number)
        wait_until(seen)


def wait_until(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def taken() -> Iterator[Taken]:
    taken = Taken()
    with signals_taken(taken.request):
        yield taken


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_request_once_the_run_takes_steps(number: signal.Signals, taken: Taken) -> None:
    with taken.request.accepted(taken.said.append):
        taken.request.check()
        taken.send(number, lambda: bool(taken.request))
        with pytest.raises(StopRequested, match=number.name):
            taken.request.check()
    assert [line.split()[0] for line in taken.said] == [number.name] and not taken.ended


def test_only_a_second_interrupt_ends_at_once(taken: Taken) -> None:
    with taken.request.accepted(taken.said.append):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            taken.send(number, lambda: bool(taken.request))
        wait_until(lambda: bool(taken.ended))
    assert taken.ended == [(signal.SIGINT, True)] and len(taken.said) == 1


def test_a_job_that_has_failed_is_not_waited_for() -> None:
    """torchrun ends the other ranks by SIGTERM when one has failed."""
    ended: list[tuple[signal.Signals, bool]] = []
    request = StopRequest(lambda number, has_begun: ended.append((number, has_begun)), lambda: True)
    with request.accepted(print):
        request.take(signal.SIGTERM)
        assert ended == [(signal.SIGTERM, True)] and not request
        request.take(signal.SIGUSR1)
        assert request and len(ended) == 1


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Python's own handling of Ctrl-C, which pytest-xdist turns off in its workers."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_before_and_after_the_steps_there_is_nothing_to_wait_for(interrupts: None, taken: Taken) -> None:
    taken.send(signal.SIGUSR1, lambda: len(taken.ended) == 1)
    with pytest.raises(KeyboardInterrupt):
        taken.send(signal.SIGINT, lambda: False)
    with taken.request.accepted(taken.said.append):
        pass
    taken.send(signal.SIGTERM, lambda: len(taken.ended) == 2)
    assert taken.ended == [(signal.SIGUSR1, False), (signal.SIGTERM, True)] and not taken.request


def test_a_signal_is_taken_while_the_main_thread_waits_in_c_code(taken: Taken) -> None:
    with taken.request.accepted(taken.said.append):
        at: list[float] = []
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Thread(target=lambda: (wait_until(lambda: bool(taken.request)), at.append(time.monotonic()))).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
        ended = time.monotonic()
        wait_until(lambda: bool(at))
    assert at[0] < ended


def test_handlers_are_as_before_in_the_end() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with signals_taken(StopRequest()) as _, ExitStack() as stack:
        stack.enter_context(StopRequest().accepted(print))
        assert signal.getsignal(signal.SIGTERM) not in (before[0], signal.SIG_DFL)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_a_forked_child_ignores_them_and_does_not_pass_them_on(taken: Taken) -> None:
    """torchrun signals a rank's process group; a child that writes a checkpoint must write it to its end."""
    with taken.request.accepted(taken.said.append):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(writer, b".")
            time.sleep(0.5)
            os._exit(7)
        os.read(reader, 1)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(child, number)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not taken.request and not taken.said


ORPHAN = """
import os, subprocess, sys, time
rank = '''
import sys, time
from megatron_hdpo.parallel.stop_request import end_with_agent
end_with_agent()
print("rank", flush=True)
time.sleep(600)
'''
process = subprocess.Popen([sys.executable, "-c", rank], env=os.environ | {"TORCHELASTIC_RUN_ID": "run"})
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
@pytest.mark.fault(
    "torchrun's agent is killed",
    phase="all",
    seen="its ranks end, none trains on",
    lost="nothing: the steps since the last checkpoint are taken again, with the same numbers",
)
def test_a_rank_ends_with_the_agent_that_started_it() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        rank = psutil.Process(int(agent.stdout.readline()))
        assert agent.stdout.readline() == "rank\n"
        agent.kill()
    wait_until(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE)


def request_on_rank_1() -> str:
    from megatron_hdpo.parallel.context import start
    from megatron_hdpo.parallel.layout import ParallelConfig

    context = start(ParallelConfig(timeout_minutes=1 / 60), "cpu")
    with context.heartbeat.stop.accepted(lambda line: None):
        context.barrier("the first meeting")
        if context.rank == 1:
            context.heartbeat.stop.ask("SIGUSR1 on a node")
        wait_until(lambda: bool(context.heartbeat.stop))
        context.barrier("both know")
    return context.heartbeat.stop.reason


def test_a_request_on_one_rank_reaches_the_others() -> None:
    assert run_ranks(2, request_on_rank_1) == ["SIGUSR1 on a node"] * 2

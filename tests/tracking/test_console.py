"""What a console prints, in a file and on a terminal, and what reaches the log."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import threading
import time

import pytest

from megatron_hdpo.tracking.console import SHOWN, Console
from megatron_hdpo.tracking.evaluations import Evaluations
from megatron_hdpo.tracking.formats import amount, clock, duration, fitted, number, pace
from megatron_hdpo.tracking.timing import PhaseTimer
from megatron_hdpo.types.headline import CLIFF_RATE, ENTROPY

METRICS = {"rollout/reward_mean": 0.25, "rollout/cliff_rate": 0.5, "time/step_s": 7.5}


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Timed:
    """A console in a file, whose time passes when told and whose ticks come every half second."""

    def __init__(self, **settings):
        self.stream, self.clock = io.StringIO(), Clock()
        self.console = Console(True, stream=self.stream, clock=self.clock, tick_s=None, **settings)

    def wait(self, seconds):
        for _ in range(round(2 * seconds)):
            self.clock.now += 0.5
            self.console.tick()

    @property
    def lines(self):
        return [re.sub(r"^\[\d\d:\d\d:\d\d\] ", "", line) for line in self.stream.getvalue().splitlines()]


@pytest.mark.parametrize("enabled", [True, False])
def test_every_rank_knows_what_it_does_without_times(enabled):
    clock = Clock()
    console = Console(enabled, stream=io.StringIO(), clock=clock, tick_s=None)
    assert console.doing() == ""
    with console.phase("prepare"), console.phase("rollout", total=0, unit="sample") as phase:
        before = console.doing()
        phase.extend(1200)
        phase.advance(8)
        phase.note("on rank 0")
        said = console.doing()
        clock.now += 60
        assert (before, said, console.doing()) == ("rollout", *["rollout 8/1,200 samples, on rank 0"] * 2)
    assert console.doing() == ""


def test_a_short_phase_is_not_mentioned_and_a_long_one_in_one_line():
    timed = Timed()
    timed.console.step(1, 9, METRICS)
    for seconds in (9, 11):
        with timed.console.phase("rollout", total=200, unit="sample") as phase:
            phase.advance(200)
            timed.wait(seconds)
    assert timed.lines[3:] == ["rollout: 200 samples in 11 s, 18.2/s"]
    assert re.match(r"\[\d\d:\d\d:\d\d\] rollout", timed.stream.getvalue().splitlines()[-1])
    assert "\x1b" not in timed.stream.getvalue()


def test_a_very_long_phase_is_mentioned_every_minute():
    timed = Timed()
    timed.console.step(1, 9, METRICS)
    with timed.console.phase("train", total=1300, unit="token") as phase:
        for _ in range(13):
            timed.wait(10)
            phase.advance(100)
    assert timed.lines[3:] == [
        "train: 500/1,300 tokens (38 %), 8.3/s, 1 min 40 s left",
        "train: 1,100/1,300 tokens (85 %), 9.2/s, 22 s left",
        "train: 1,300 tokens in 2 min 10 s, 10.0/s",
    ]


def test_a_phase_of_the_start_is_mentioned_every_two_seconds_and_then_every_ten():
    timed = Timed()
    with timed.console.phase("load data"):
        timed.wait(1.5)
    with timed.console.phase("start engine") as phase:
        phase.note("0 of 1 servers answer")
        timed.wait(65)
    times = [
        *(f"{second}.0 s" for second in (2, 4, 6, 8)),
        *(f"{second} s" for second in (*range(10, 21, 2), 30, 40, 50)),
    ]
    assert timed.lines == [
        *(f"start engine: {time}, 0 of 1 servers answer" for time in (*times, "1 min 00 s", "done in 1 min 05 s")),
    ]


def test_lines_are_as_frequent_as_wanted():
    timed = Timed(progress_s=1.0)
    timed.console.step(1, 9, METRICS)
    with timed.console.phase("sync"):
        timed.wait(3)
    assert timed.lines[3:] == [*(f"sync: {second}.0 s" for second in (1, 2, 3)), "sync: done in 3.0 s"]


def test_only_the_innermost_of_nested_phases_is_mentioned_and_their_times_do_not_overlap():
    timed = Timed()
    with timed.console.phase("prepare"):
        timed.wait(1)
        with timed.console.phase("Warm-up (plain)"):
            timed.wait(4)
    timed.clock.now += 10
    assert timed.console.timer.metrics() == {
        "time/prepare_s": 1.0, "time/warm_up_plain_s": 4.0, "time/step_s": 15.0
    }  # fmt: skip
    assert timed.lines == [
        *("Warm-up (plain): 2.0 s", "Warm-up (plain): 4.0 s", "Warm-up (plain): done in 4.0 s"),
        "prepare: done in 5.0 s",
    ]


def test_a_phase_that_raises_says_so_and_is_timed():
    timed = Timed()
    with pytest.raises(RuntimeError, match="broken"), timed.console.phase("build"), timed.console.phase("sync"):
        timed.clock.now += 1
        raise RuntimeError("broken")
    assert timed.lines == ["sync: stopped after 1.0 s by RuntimeError"]
    assert timed.console.timer.metrics()["time/sync_s"] == 1.0


def test_the_total_grows_and_progress_is_never_over_100_percent():
    timed = Timed()
    with timed.console.phase("rollout", total=0, unit="sample") as phase:
        assert phase.progress() == "0.0 s"
        phase.extend(32)
        phase.advance(32)
        assert phase.progress() == "32/32 samples (100 %)"
        phase.extend(8)  # privileged rollouts
        assert phase.progress() == "32/40 samples (80 %)"
        phase.advance(9)  # a batch with padding
        assert phase.progress() == "40/40 samples (100 %)" and phase.shown == 40


def test_nothing_to_do_has_no_amount():
    timed = Timed()
    with timed.console.phase("train", total=0, unit="token") as phase:
        phase.advance(1)  # the filler of a replica without work
        timed.wait(3)
    assert timed.lines == ["train: 2.0 s", "train: done in 3.0 s"]


def test_the_remaining_time_is_not_guessed_at_the_start():
    timed = Timed()
    with timed.console.phase("evaluate", total=864, unit="sample") as phase:
        timed.wait(12)  # the first sample comes late
        phase.advance(8)
        assert phase.left_s is None
        timed.wait(2)
        phase.advance(100)
        assert phase.left_s is None
        timed.wait(2)
        phase.advance(100)
        assert phase.left_s == pytest.approx((864 - 208) * 4 / 200)
        assert phase.progress().endswith(", 13 s left")


def test_units_are_singular_after_one():
    timed = Timed()
    for total in (1, 24):
        with timed.console.phase("warm-up", total=total, unit="step") as phase:
            phase.advance(total)
            timed.wait(2)
    assert timed.lines == [
        "warm-up: 1/1 step (100 %), 2.0 s each", "warm-up: 1 step in 2.0 s, 2.0 s each",
        "warm-up: 24/24 steps (100 %), 12.0/s", "warm-up: 24 steps in 2.0 s, 12.0/s",
    ]  # fmt: skip


def test_phase_times_add_up_over_repeats_and_threads():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.measure("train"):
        clock.now += 1
        # Another thread's phase is not nested in this one: it must not be taken out of its time.
        thread = threading.Thread(target=lambda: timer.measure("rollout").__enter__())
        thread.start()
        thread.join()
    with timer.measure("train"):
        clock.now += 2
    assert timer.metrics()["time/train_s"] == 3.0
    with pytest.raises(ValueError, match="whole step"), timer.measure("step"):
        pass


def test_other_ranks_are_silent_but_timed(capfd, caplog):
    console = Console(False)
    assert not console.interactive
    with caplog.at_level(logging.INFO):
        with console.phase("rollout", total=10, unit="token") as phase:
            phase.advance()
        console.step(1, 2, {})
        console.table("t", [{"a": 1}])
        console.print("x")
        console.warn("odd")
    assert capfd.readouterr() == ("", "")
    assert "time/rollout_s" in console.timer.metrics()
    assert [record.getMessage() for record in caplog.records] == ["odd"]  # its log file gets it


def test_one_line_per_step_under_a_header_repeated_every_20_rows():
    timed = Timed()
    for step in range(1, 42):
        timed.clock.now += 10
        timed.console.step(step, 2000, METRICS, [CLIFF_RATE, ENTROPY])
    legend, *rows = timed.stream.getvalue().splitlines()
    assert legend.startswith("columns: reward = mean reward; ") and legend.endswith("- = not measured")
    assert [index for index, row in enumerate(rows) if "reward" in row] == [0, 21, 42]
    assert len(rows) == 41 + 3 and len({len(row) for row in rows}) == 1 and len(rows[0]) <= 80
    assert rows[1].split() == ["1/2000", "0.250", "0.500", "-", "-", "-", "-", "7.5", "-"]
    assert rows[2].split()[-1] == "5h33m"  # 1998 steps of 10 s


def test_an_evaluation_is_shown_with_the_time_of_the_run():
    timed = Timed()
    evaluations = Evaluations()
    evaluated = {"eval/gsm/pass@4": 0.5, "eval/gsm/pass@4_low": 0.3, "eval/gsm/pass@4_high": 0.7}
    timed.console.evaluation(0, evaluations.add(0, {}))
    assert timed.lines == []
    timed.clock.now += 75
    timed.console.evaluation(0, evaluations.add(0, evaluated))
    assert timed.lines == [
        "evaluation before step 1: 1 min 15 s elapsed",
        "  set  metric    value  95 % interval   best so far",
        "  gsm  pass@4    0.500  0.300 to 0.700  this one",
    ]
    for step in (1, 2):
        timed.clock.now += 60
        timed.console.step(step, 10, METRICS)
    timed.console.evaluation(2, evaluations.add(2, evaluated | {"eval/gsm/pass@4": 0.4}))
    assert timed.lines[-3:] == [
        "evaluation after step 2: 3 min 15 s elapsed, about 8 min 00 s left",
        "  set  metric    value  95 % interval   best so far",
        "  gsm  pass@4    0.400  0.300 to 0.700  0.500 before step 1",
    ]


def test_text_from_outside_is_never_markup_nor_cut():
    timed = Timed()
    nasty = "[bold]x[/] :smile: " + "y" * 300
    timed.console.print(nasty)
    timed.console.warn("[/] broken markup")
    timed.console.table("[red]t", [{"[b]name": "[/nope]", "value": 0.123456}, {"[b]name": None, "value": 3}])
    text = timed.stream.getvalue()
    assert nasty in text.splitlines()
    assert "warning: [/] broken markup" in text
    assert "[red]t" in text and "[b]name" in text and "[/nope]" in text and "0.1235" in text


def test_each_warning_is_said_once_and_carries_the_mark(caplog):
    timed = Timed()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            timed.console.warn("top-p biases the ratio")
        timed.console.warn("another")
    assert timed.lines == ["warning: top-p biases the ratio", "warning: another"]
    assert len(caplog.records) == 2
    assert all(getattr(record, SHOWN) for record in caplog.records)  # so that no handler prints them again


def test_numbers_stand_on_the_right_also_when_formatted():
    timed = Timed()
    rows = [{"name": "a", "change": "+0.118", "n": 5, "share": "43.8%"}, {"name": "bcd", "change": "-", "n": 1234}]
    timed.console.table("t", rows)
    assert "a     +0.118     5  43.8%" in timed.lines
    assert "bcd        -  1234      -" in timed.lines


def test_empty_table():
    timed = Timed()
    timed.console.table("Evaluation", [])
    assert timed.stream.getvalue() == "Evaluation: nothing to show\n"


def test_threads_share_a_phase_without_losing_counts_or_mixing_lines():
    timed = Timed(progress_s=0.5)

    def work(phase):
        for _ in range(100):
            phase.advance()
            timed.wait(0.5)

    with timed.console.phase("judge", total=400, unit="rollout") as phase:
        threads = [threading.Thread(target=work, args=(phase,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert phase.done == 400
    assert len(timed.lines) > 1 and all(line.startswith("judge: ") for line in timed.lines)


def test_a_thread_looks_whether_a_line_is_due():
    stream = io.StringIO()
    console = Console(True, stream=stream, progress_s=0.01, tick_s=0.01)
    with console.phase("save"):
        deadline = time.monotonic() + 60
        while "save: " not in stream.getvalue():
            assert time.monotonic() < deadline, "no line about a phase that does not advance"
            time.sleep(0.01)


class Terminal:
    """A pseudo-terminal, and everything that was written to it."""

    def __init__(self):
        leader, self.follower = pty.openpty()
        self.chunks = []
        self.reader = threading.Thread(target=self._drain, args=(leader,), daemon=True)
        self.reader.start()

    def _drain(self, leader):
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError:
                return
            if not chunk:
                return
            self.chunks.append(chunk)

    @property
    def text(self):
        return b"".join(self.chunks).decode(errors="ignore")

    def wait_for(self, shown):
        deadline = time.monotonic() + 60
        while shown not in self.text:
            assert time.monotonic() < deadline, f"{shown} was never shown"
            time.sleep(0.02)


def test_terminal_gets_live_bars_that_leave_no_trace_between_rows():
    terminal = Terminal()
    with os.fdopen(terminal.follower, "w", encoding="utf-8") as stream:
        console = Console(True, stream=stream)
        assert console.interactive
        with console.phase("rollout", total=1000, unit="token") as outer:
            outer.advance(500)
            terminal.wait_for("500/1,000 tokens (50 %)")
            with console.phase("judge", total=4, unit="rollout") as inner:
                inner.advance(1)
                terminal.wait_for("1/4 rollouts (25 %)")
                console.warn("between the bars")
            with pytest.raises(KeyError), console.phase("fails"):
                raise KeyError
        with console.phase("train", total=3) as phase:  # a new display after the first one ended
            phase.advance(3)
            terminal.wait_for("3/3")
        console.step(1, 10, METRICS)
        console.print("word " * 30)
    terminal.reader.join(60)
    text = terminal.text
    assert "\x1b[" in text and " elapsed" in text
    assert "  judge" in text and "between the bars" in text and "0.250" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor comes back
    assert not re.search(r"w\r\nord|wo\r\nrd|wor\r\nd", text) and "stopped after" not in text


@pytest.mark.parametrize(("width", "shown"), [(80, False), (160, True)])
def test_a_wide_terminal_shows_more_columns(width, shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    terminal = Terminal()
    with os.fdopen(terminal.follower, "w", encoding="utf-8") as stream:
        Console(True, stream=stream).step(1, 10, METRICS)
    terminal.reader.join(60)
    assert ("elapsed" in terminal.text) == shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(8.21), "8.2 s"),
        (duration(9.97), "10 s"),
        (duration(59.4), "59 s"),
        (duration(59.7), "1 min 00 s"),
        (duration(75), "1 min 15 s"),
        (duration(7300), "2 h 01 min"),
        (duration(200_000), "2 d 07 h"),
        (clock(8.21), "8s"),
        (clock(75), "1m15s"),
        (clock(7300), "2h01m"),
        (clock(200_000), "2d07h"),
        (clock(86_399), "23h59m"),
        (number(12345.0), "12,345"),
        (number(0.5), "0.5"),
        (amount(1, "step"), "1 step"),
        (amount(2048, "sample"), "2,048 samples"),
        (pace(170.4), "170/s"),
        (pace(2.5), "2.5/s"),
        (pace(0.25), "4.0 s each"),
        (fitted(0.25, ".3f", 7), "0.250"),
        (fitted(1234567.0, ",.0f", 7), "1.23M"),
        (fitted(999_999.0, ",.1f", 7), "1M"),
        (fitted(-1.2345e-5, ".3g", 7), "-1e-05"),
        (fitted(None, ".3f", 7), "-"),
    ],
)
def test_formats(text, expected):
    assert text == expected

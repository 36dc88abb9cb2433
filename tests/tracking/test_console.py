import io
import logging
import os
import pty
import re
import threading
import time

import pytest

from megatron_hdpo.tracking.console import SHOWN, Console
from megatron_hdpo.tracking.formats import duration, number, speed
from megatron_hdpo.tracking.timing import PhaseTimer


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def log_console(**settings):
    stream, clock = io.StringIO(), Clock()
    return Console(True, stream=stream, clock=clock, **settings), stream, clock


def lines_of(stream):
    return [re.sub(r"^\[\d\d:\d\d:\d\d\] ", "", line) for line in stream.getvalue().splitlines()]


def test_log_file_gets_a_line_at_start_every_few_seconds_and_at_the_end():
    console, stream, clock = log_console(interval_s=5.0)
    assert not console.interactive
    with console.phase("rollout", total=2000, unit="tok") as phase:
        for _ in range(20):
            clock.now += 1.0
            phase.advance(100)
    assert lines_of(stream) == [
        "rollout: 2,000 tok ...",
        "rollout: 500/2,000 tok (25 %), 100 tok/s, 15 s to go",
        "rollout: 1,000/2,000 tok (50 %), 100 tok/s, 10 s to go",
        "rollout: 1,500/2,000 tok (75 %), 100 tok/s, 5.0 s to go",
        "rollout: 2,000/2,000 tok (100 %), 100 tok/s",
        "rollout: 2,000 tok in 20 s, 100 tok/s",
    ]
    assert "\x1b" not in stream.getvalue()
    assert re.match(r"\[\d\d:\d\d:\d\d\] rollout", stream.getvalue())


def test_phase_without_total_or_units():
    console, stream, clock = log_console()
    with console.phase("load weights"):
        clock.now += 75
    with console.phase("convert", unit="tensor") as phase:
        clock.now += 6
        phase.advance(12)
    assert lines_of(stream) == [
        "load weights ...",
        "load weights: done in 1 min 15 s",
        "convert ...",
        "convert: 12 tensor, 2.0 tensor/s",
        "convert: 12 tensor in 6.0 s, 2.0 tensor/s",
    ]


def test_phase_that_raises_says_so_and_is_timed():
    console, stream, clock = log_console()
    with pytest.raises(RuntimeError, match="broken"), console.phase("sync"):
        clock.now += 2
        raise RuntimeError("broken")
    assert lines_of(stream)[-1] == "sync: stopped after 2.0 s by RuntimeError"
    assert console.timer.metrics()["time/sync_s"] == 2.0


def test_nested_phases_are_shown_and_their_times_do_not_overlap():
    console, stream, clock = log_console()
    with console.phase("evaluation"):
        clock.now += 1
        with console.phase("Rollout (eval)"):
            clock.now += 4
        clock.now += 2
    clock.now += 10
    assert console.timer.metrics() == {"time/evaluation_s": 3.0, "time/rollout_eval_s": 4.0, "time/step_s": 17.0}
    assert console.timer.metrics() == {"time/step_s": 0.0}
    assert [line.split(":")[0] for line in lines_of(stream)] == [
        "evaluation ...",
        "Rollout (eval) ...",
        "Rollout (eval)",
        "evaluation",
    ]


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


def test_other_ranks_are_silent_but_time_their_phases(capfd, caplog):
    console = Console(False)
    with caplog.at_level(logging.WARNING), console.phase("rollout", total=2) as phase:
        phase.advance()
        console.step(1, 2, {})
        console.table("t", [{"a": 1}])
        console.print("x")
        console.warn("odd")
        console.once("odd once")
    assert capfd.readouterr() == ("", "")
    assert "time/rollout_s" in console.timer.metrics()
    assert [record.getMessage() for record in caplog.records] == ["odd", "odd once"]  # its log file gets them


def test_step_rows_line_up_under_a_header_repeated_every_20_rows():
    console, stream, _ = log_console()
    full = {
        "rollout/reward_mean": 0.25,
        "rollout/cliff_rate": 0.5,
        "privileged/success_rate": 0.75,
        "distill/tokens": 12345,
        "distill/divergence": 0.01234,
        "train/grad_norm": 12.3456,
        "time/rollout_s": 3.0,
        "time/train_s": 4.5,
    }
    for step in range(1, 42):
        console.step(step, 2000, full if step % 2 else {"time/step_s": 1.0, "train/grad_norm": None})
    rows = stream.getvalue().splitlines()
    assert [index for index, row in enumerate(rows) if "reward" in row] == [0, 21, 42]
    assert len({len(row) for row in rows}) == 1
    assert rows[0].split() == ["step", "reward", "cliffs", "priv.", "tokens", "diverg.", "grad", "seconds"]
    assert rows[1].split() == ["1/2000", "0.250", "0.500", "0.750", "12,345", "0.0123", "12.3", "7.5"]
    assert rows[2].split() == ["2/2000", "-", "-", "-", "-", "-", "-", "1.0"]


def test_text_from_outside_is_never_markup_nor_cut():
    console, stream, _ = log_console()
    nasty = "[bold]x[/] :smile: " + "y" * 300
    console.print(nasty)
    console.warn("[/] broken markup")
    console.table("[red]t", [{"[b]name": "[/nope]", "value": 0.123456}, {"[b]name": None, "value": 3}])
    text = stream.getvalue()
    assert nasty in text.splitlines()
    assert "warning: [/] broken markup" in text
    assert "[red]t" in text and "[b]name" in text and "[/nope]" in text and "0.1235" in text


def test_once_is_said_once_and_warnings_carry_the_mark(caplog):
    console, stream, _ = log_console()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            console.once("top-p biases the ratio")
        console.once("another")
    assert stream.getvalue().count("top-p") == 1 and stream.getvalue().count("another") == 1
    assert len(caplog.records) == 2
    assert all(getattr(record, SHOWN) for record in caplog.records)  # so that no handler prints them again


def test_numbers_stand_on_the_right_also_when_formatted():
    console, stream, _ = log_console()
    rows = [{"name": "a", "change": "+0.118", "n": 5, "share": "43.8%"}, {"name": "bcd", "change": "-", "n": 1234}]
    console.table("t", rows)
    lines = stream.getvalue().splitlines()
    assert "│ a    │ +0.118 │    5 │ 43.8% │" in lines
    assert "│ bcd  │      - │ 1234 │     - │" in lines


def test_empty_table():
    console, stream, _ = log_console()
    console.table("Evaluation", [])
    assert stream.getvalue() == "Evaluation: nothing to show\n"


def test_threads_share_a_phase_without_losing_counts_or_mixing_lines():
    console, stream, _ = log_console(interval_s=0.0)

    def work(phase):
        for _ in range(100):
            phase.advance()

    with console.phase("judge", total=400, unit="rollout") as phase:
        threads = [threading.Thread(target=work, args=(phase,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert phase.done == 400
    assert len(lines_of(stream)) == 402
    assert all(line.startswith("judge: ") for line in lines_of(stream))


def test_terminal_gets_live_bars_that_leave_no_trace_between_rows():
    leader, follower = pty.openpty()
    chunks = []

    def drain():
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError:
                return
            if not chunk:
                return
            chunks.append(chunk)

    def wait_for(shown: str) -> None:
        deadline = time.monotonic() + 60
        while shown not in b"".join(chunks).decode(errors="ignore"):
            assert time.monotonic() < deadline, f"{shown} was never shown"
            time.sleep(0.02)

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    with os.fdopen(follower, "w", encoding="utf-8") as stream:
        console = Console(True, stream=stream)
        assert console.interactive
        with console.phase("rollout", total=1000, unit="tok") as outer:
            outer.advance(500)
            wait_for("500/1,000")
            with console.phase("judge", total=4, unit="rollout") as inner:
                inner.advance(1)
                wait_for("1/4 rollout")
                console.warn("between the bars")
            with pytest.raises(KeyError), console.phase("fails"):
                raise KeyError
        with console.phase("train", total=3) as phase:  # a new display after the first one ended
            phase.advance(3)
            wait_for("3/3")
        console.step(1, 10, {"rollout/reward_mean": 0.5})
    reader.join(60)
    text = b"".join(chunks).decode()
    assert "\x1b[" in text
    assert "rollout" in text and "500/1,000 tok (50 %)" in text and "to go" in text
    assert "  judge" in text and "1/4 rollout (25 %)" in text
    assert "between the bars" in text and "0.500" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor comes back


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(8.21), "8.2 s"),
        (duration(59.4), "59 s"),
        (duration(59.7), "1 min 00 s"),
        (duration(75), "1 min 15 s"),
        (duration(7300), "2 h 01 min"),
        (number(12345.0), "12,345"),
        (number(0.5), "0.5"),
        (speed(170.4, "tok"), "170 tok/s"),
        (speed(2.5, "step"), "2.5 step/s"),
        (speed(0.25, "step"), "4.0 s/step"),
    ],
)
def test_formats(text, expected):
    assert text == expected

import io
import logging
import os
import socket
import subprocess
import sys
import warnings

import pytest

from megatron_hdpo.tracking.console import Console
from megatron_hdpo.tracking.evaluations import Evaluations
from megatron_hdpo.tracking.logging import configure_logging, reset_logging


@pytest.fixture(autouse=True)
def clean_root():
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    reset_logging()
    root.setLevel(level)
    assert root.handlers == handlers


def test_each_rank_has_its_file_and_only_rank_0_the_console(tmp_path):
    stream = io.StringIO()
    path = configure_logging(tmp_path, 3, Console(False, stream=stream))
    assert path == tmp_path / "logs" / "rank_00003.log"
    assert f"rank 3 on {socket.gethostname()}, process {os.getpid()}" in path.read_text().splitlines()[0]
    logging.getLogger("megatron_hdpo.training.loop").warning("lost a rollout")
    assert "WARNING megatron_hdpo.training.loop: lost a rollout" in path.read_text()
    assert stream.getvalue() == ""


def test_console_gets_our_warnings_and_everybody_s_errors_once(tmp_path):
    stream = io.StringIO()
    console = Console(True, stream=stream)
    path = configure_logging(tmp_path, 0, console)
    logging.getLogger("megatron_hdpo.rollout").info("detail")
    logging.getLogger("megatron_hdpo.rollout").warning("engine is slow [/]")
    logging.getLogger("megatron_hdpo_other").warning("not ours")
    logging.getLogger("megatron.core.optimizer").warning("noise")
    logging.getLogger("megatron.core.optimizer").error("real trouble")
    logging.getLogger("megatron_hdpo.rollout").debug("too much")
    console.warn("by the console")
    shown, written = stream.getvalue(), path.read_text()
    for text in ("engine is slow [/]", "real trouble", "by the console"):
        assert shown.count(text) == 1 and written.count(text) == 1
    for text in ("detail", "noise", "not ours"):
        assert text not in shown and written.count(text) == 1
    assert "too much" not in written


def test_the_file_shows_the_run_as_the_console_does(tmp_path):
    """`tail -f` of it shows phases, steps, evaluations and warnings, on a terminal too, where phases are bars."""
    for interactive in (False, True):
        console = Console(True, interactive, stream=io.StringIO(), clock=iter(range(0, 9000, 30)).__next__, tick_s=None)
        path = configure_logging(tmp_path / str(interactive), 0, console)
        with console.phase("load model"):
            pass
        console.print("health: fine")
        console.step(1, 2, {"rollout/reward_mean": 0.125})
        console.evaluation(1, Evaluations().add(1, {"eval/gsm/pass@4": 0.375}))
        console.warn("odd")
        console.table("too wide for a log", [{"a": 1}])
        written = path.read_text()
        for text in ("load model: done in", "health: fine", " 0.125 ", "evaluation after step 1: ", " 0.375 ", "odd"):
            assert written.count(text) == 1, text
        assert "- = not measured" in written and "too wide" not in written


def test_python_warnings_go_to_the_file_and_ours_to_the_console(tmp_path):
    stream = io.StringIO()
    path = configure_logging(tmp_path, 0, Console(True, stream=stream))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn_explicit("theirs", UserWarning, "/site-packages/megatron/core/x.py", 1)
        warnings.warn_explicit("ours", UserWarning, "/site-packages/megatron_hdpo/x.py", 1)
    logging.captureWarnings(False)
    assert "theirs" in path.read_text() and "ours" in path.read_text()
    assert "ours" in stream.getvalue() and "theirs" not in stream.getvalue()


def test_called_again_it_replaces_its_handlers(tmp_path):
    streams = [io.StringIO(), io.StringIO()]
    for stream in streams:
        path = configure_logging(tmp_path, 0, Console(True, stream=stream))
    logging.getLogger("megatron_hdpo").warning("said")
    assert streams[0].getvalue() == "" and streams[1].getvalue().count("said") == 1
    assert path.read_text().count("said") == 1


def test_libraries_that_print_to_stderr_are_quiet_but_kept(tmp_path):
    # In a process of its own: transformers sets up its handler on the stderr it finds at its first import.
    script = f"""
import logging, sys
from megatron_hdpo.tracking.logging import configure_logging
library = logging.getLogger("noisy"); library.addHandler(logging.StreamHandler()); library.propagate = False
configure_logging({str(tmp_path)!r}, 0)
library.warning("noise one")
import transformers
transformers.utils.logging.get_logger("transformers.x").warning("noise two")
logging.getLogger("megatron_hdpo").warning("to be seen")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert "noise one" in written and "noise two" in written and "to be seen" in written
    assert "noise" not in done.stderr + done.stdout and "to be seen" in done.stderr

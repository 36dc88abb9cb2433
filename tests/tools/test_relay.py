"""Commands that are relayed: their output, their failures, their end."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import install_environment
import psutil
import pytest
from install_environment import file_name, matters, size_of, size_sentence
from recipes import ROOT
from relay import Part, PartFailed, Screen, run


def python(code: str, log: Path, **changes: object) -> Part:
    return Part("part", [sys.executable, "-c", code], log, **changes)  # type: ignore[arg-type]


def test_lines_that_matter_are_shown_and_all_go_into_the_log(tmp_path: Path) -> None:
    screen = Screen(io.StringIO(), silence_s=1000)
    part = python("print('a 1'); print('b 2'); print('a 3')", tmp_path / "log", matters=lambda line: line[0] == "a")
    run(screen, part)
    assert screen.stream.getvalue() == "a 1\na 3\n"
    assert (tmp_path / "log").read_text() == "a 1\nb 2\na 3\n"
    assert part.latest == "b 2"


def test_a_silence_is_filled_with_name_and_state(tmp_path: Path) -> None:
    screen = Screen(io.StringIO(), silence_s=0)
    run(screen, python("print('so far')", tmp_path / "log", matters=lambda line: False))
    assert "  part: so far (" in screen.stream.getvalue()


def test_a_failure_names_the_part_and_shows_its_last_lines(tmp_path: Path) -> None:
    code = "print('\\n'.join(map(str, range(50)))); raise SystemExit(3)"
    with pytest.raises(PartFailed) as failure:
        run(Screen(io.StringIO()), python(code, tmp_path / "log"))
    text = str(failure.value)
    assert text.startswith("part failed with exit code 3:\n  30\n") and "\n  49\n" in text
    assert text.endswith(str(tmp_path / "log"))


def test_a_failure_stops_the_others(tmp_path: Path) -> None:
    waiting = Part("waiting", [sys.executable, "-c", "import time; time.sleep(1000)"], tmp_path / "waiting")
    with pytest.raises(PartFailed, match="part failed"):
        run(Screen(io.StringIO()), waiting, python("raise SystemExit(1)", tmp_path / "log"))


def test_an_interruption_stops_the_command_and_its_children(tmp_path: Path) -> None:
    # As a rank of torchrun does it: a session of its own, and a child that ignores SIGTERM.
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(1000)"
    code = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, start_new_session=True)\n"
        "p.stdout.readline(); print(p.pid, flush=True); p.wait()"
    )
    part = python(code, tmp_path / "log", matters=lambda line: False)

    def interrupt() -> None:
        if part.latest:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Screen(io.StringIO()), part, on_tick=interrupt)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(part.latest)).wait(timeout=30)


def test_a_signal_is_an_interruption() -> None:
    from relay import interrupt_on_signals

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        interrupt_on_signals()
        for number in before:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                signal.pause()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_size_of_a_download_is_said(tmp_path: Path) -> None:
    assert size_sentence({"torch-2.whl": 190_000_000, "sympy.whl": 6_000_000}) == (
        "to download for torch: 196 MB in 2 files (torch-2.whl: 190 MB)"
    )
    said = size_sentence({"torch-2.whl": 900_000_000, "nvidia_cublas.whl": None})
    assert said.startswith(
        "to download for torch: 900 MB in 1 files (torch-2.whl: 900 MB), and 1 files of unknown size: "
    )
    assert said.endswith("nvidia_cublas.whl. This is a build for CUDA; TORCH_INDEX chooses one for CPUs (README)")


def test_the_size_of_a_file_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "torch-2.13.0+cpu.whl"
    file.write_bytes(b"12345")
    url = file.as_uri()
    assert size_of(url) == 5 and file_name(url) == "torch-2.13.0+cpu.whl"
    assert size_of((tmp_path / "none").as_uri()) is None


def test_of_pip_downloads_and_errors_are_shown() -> None:
    assert matters("  Downloading x.whl (4.3 MB)") and matters("ERROR: no") and not matters("Collecting x")


def test_each_python_gets_its_constraints_and_another_is_told_which_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", SimpleNamespace(major=3, minor=12))
    assert install_environment.constraints() == ROOT / "constraints" / "cpu-py312.txt"
    assert install_environment.constraints().is_file()
    assert install_environment.constraints("cu130").is_file()  # of `make rehearsal-env`

    (tmp_path / "cpu-py311.txt").touch()
    monkeypatch.setattr(sys, "version_info", (3, 14))
    monkeypatch.setattr(install_environment, "constraints", lambda device: tmp_path / "cpu-py314.txt")
    monkeypatch.setattr(install_environment, "CONSTRAINTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["install_environment.py", str(tmp_path / "venv"), "dev"])
    with pytest.raises(SystemExit) as ended:
        install_environment.main()
    assert "cpu-py314.txt" in str(ended.value) and "cpu-py311 are there" in str(ended.value)
    assert not (tmp_path / "venv").exists()

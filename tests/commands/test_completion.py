"""`completion`: the script that bash runs proposes commands, options and files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import run_world

from megatron_hdpo import cli


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab")
    path = tmp_path_factory.mktemp("completion") / "script"
    with path.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        cli.main(["completion", "bash"])
    return path


def proposals(script: Path, *words: str) -> list[str]:
    """What bash proposes for the last word, in the folder of the script."""
    line = " ".join(f"'{word}'" for word in ("megatron_hdpo", *words))
    ask = f"""
    source {script}
    COMP_WORDS=({line}); COMP_CWORD={len(words)}
    $(complete -p megatron_hdpo | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", ask], cwd=script.parent, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_options_and_files(script: Path) -> None:
    assert {"chat", "check"} <= set(proposals(script, "ch")) and "train" not in proposals(script, "ch")
    assert proposals(script, "evaluate", "--o") == ["--out"]
    assert proposals(script, "convert", "--to", "meg") == ["megatron"]
    (script.parent / "recipe.yaml").touch()
    assert "recipe.yaml" in proposals(script, "train", "rec")


def test_without_shtab_one_line_says_so() -> None:
    ended = run_world(1, _complete_without_shtab)
    assert ended.codes == [2] and ended.stderr[0].startswith("shtab is not installed for ")
    assert ended.stderr[0].count("\n") == 1


def _complete_without_shtab() -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "shtab" else find_spec(name, *rest)
    sys.meta_path.insert(0, _Absent())
    sys.modules.pop("shtab", None)
    cli.main(["completion", "bash"])


class _Absent:
    """Import finder that says of shtab what Python says of a package that is not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "shtab":
            raise ModuleNotFoundError("No module named 'shtab'", name=name)

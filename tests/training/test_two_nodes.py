"""Two torchrun agents on loopback, started by the script for several nodes: one is lost and comes back."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from commands import results_of, run_command
from recipes import ROOT, Tree, small_recipe
from test_run import metrics_of

from megatron_hdpo.sampling.saved import step_file

STEPS, RANKS = 2, 2
PATIENCE_S = 240.0

Node = subprocess.Popen[bytes]


def recipe_of(model: Path, output: Path) -> Tree:
    """Tensor-parallel inside a node, data-parallel between the two; a checkpoint after every step."""
    tree = small_recipe(model, output)
    tree["parallel"] = {"tensor": 2, "timeout_minutes": 1.0}
    tree["train"]["steps"] = STEPS
    tree["checkpoint"] = {"every": 1, "keep": STEPS, "export": False}
    tree["tracking"], tree["self_test"] = {"tensorboard": False}, {"enabled": False}
    tree["evaluation"] = {"before": False, "samples": 1, "k": [1]}
    return tree


@contextmanager
def nodes(recipe: Path, console: Path) -> Iterator[Callable[[int], Node]]:
    """Starts the agent of a node, appending to `console`/node<n>.txt; nothing of them is left at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "NODES": "2",
        "RANKS": str(RANKS),
        "HEAD": f"127.0.0.1:{port}",
        "REJOIN_S": "3",
        "RESTARTS": "10",  # under load, three seconds without a sign of life are no rare thing
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment = {**os.environ, **variables, "TORCHRUN": str(Path(sys.executable).parent / "torchrun")}
    started: list[Node] = []

    def start(number: int) -> Node:
        command = ["bash", str(ROOT / "examples/cluster/several_nodes.sh"), str(recipe)]
        with open(console / f"node{number}.txt", "ab") as file:
            node = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        started.append(node)
        # On loopback either agent could be the head; the first one shall be.
        wait_for(lambda: _answers(port), lambda: f"no agent listens at port {port}")
        return node

    try:
        yield start
    finally:
        for node in started:
            lose(node)


def lose(node: Node) -> None:
    """What a power cut does: agent, ranks and their children end at once."""
    with suppress(psutil.NoSuchProcess):
        agent = psutil.Process(node.pid)
        for process in [agent, *agent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    node.wait()


def wait_for(what: Callable[[], bool], says: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, says()
        time.sleep(0.01)


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def left_over(mark: str) -> list[str]:
    """Processes whose command line names `mark`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if mark in line and process.pid != os.getpid():
                found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.fault(
    "one of two nodes is lost, and a new one joins",
    phase="sampling",
    seen="torchrun starts the ranks again; `resumed from step_...`",
    lost="nothing: the steps since the last checkpoint are taken again, with the same numbers",
)
def test_a_lost_node_comes_back_and_the_run_ends_as_if_nothing_had_been(tiny_model: Path, tmp_path: Path) -> None:
    whole = recipe_of(tiny_model, tmp_path / "whole")
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(whole))
    results_of(run_command("train", str(tmp_path / "whole.yaml"), ranks=2 * RANKS, timeout=PATIENCE_S))

    tree, recipe = recipe_of(tiny_model, tmp_path / "run"), tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    folder = tmp_path / "run"

    def said() -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(tmp_path.glob("node*.txt")))

    with nodes(recipe, tmp_path) as start:
        first, second = start(0), start(1)
        wait_for((folder / "rollouts" / step_file(2, 0)).exists, said)  # amid step 2
        lose(second)
        assert not (folder / "checkpoints" / "step_00000002").exists(), "killed too late for this test to mean anything"
        second = start(1)
        wait_for(lambda: first.poll() is not None and second.poll() is not None, said)
        assert (first.returncode, second.returncode) == (0, 0), said()
        assert left_over(str(recipe)) == []
    assert "resumed from step_00000001" in said()
    assert metrics_of(tree) == metrics_of(whole)
    _check_logs(folder)


def _check_logs(folder: Path) -> None:
    ranks = sorted((folder / "logs").glob("rank_*.log"))
    assert [path.name for path in ranks] == [f"rank_{rank:05d}.log" for rank in range(2 * RANKS)]
    for rank, path in enumerate(ranks):
        log = path.read_text()
        # The undisturbed start and the one after the loss; the same agent may have tried in between.
        assert len(re.findall(rf"rank {rank} on \S+, process \d+", log)) >= 2
    # What ranks print, kept for each agent: the first node's, the lost one's, that of the one that came in its place.
    # How many attempts an agent counts depends on when it hears of the other: it counts one when it saw a rank fail,
    # and overwrites the files of the attempt before when it restarts because a node joined.
    agents = list((folder / "logs" / "torchrun" / socket.gethostname()).iterdir())
    assert len(agents) == 3
    for agent in agents:
        attempts = list(agent.glob("attempt_*"))
        assert attempts
        for attempt in attempts:
            assert sorted(path.parent.name for path in attempt.glob("*/stdout.log")) == [str(n) for n in range(RANKS)]

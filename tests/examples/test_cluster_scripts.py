"""What the launch scripts hand to torchrun, from the variables that schedulers give; and recipes for clusters."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from recipes import ROOT

from megatron_hdpo.config import load_recipe
from megatron_hdpo.costs.cluster import cluster_of
from megatron_hdpo.planner.from_recipe import Guesses, layout_of, rollouts_of, workload_of
from megatron_hdpo.planner.plan import plan
from megatron_hdpo.planner.shapes import architecture_of

SCRIPTS = ROOT / "examples" / "cluster"
STUBS = {
    # Each says what it was given, one argument per line, and who the agents were told to meet.
    "torchrun": 'printf "%s\\n" "$@"; env | grep -E "^(NCCL|GLOO|TORCH|CUDA_DEV|RANK|WORLD|PET|SERVER_KEY)" || true',
    "scontrol": 'printf "%s\\n" node7 node8 node9',
    # Slurm's own flags away, then the command, once: the node names that it was for are in the output.
    "srun": 'echo "srun $*"; while [[ $1 != examples/* ]]; do shift; done; exec "$@"',
    "hostname": 'if [ "${1:-}" = -i ]; then echo 10.0.0.5; else echo "${STUB_HOST:-here}"; fi',
}
SERVER = """
import http.server, os, stat, sys
def given(flag):
    return sys.argv[sys.argv.index(flag) + 1]
config = given("--config")
assert stat.S_IMODE(os.stat(config).st_mode) == 0o600
wanted = open(config).read().strip().replace("api-key: ", "Bearer ")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.path == "/model_info" and self.headers["Authorization"] == wanted
        self.send_response(200 if known else 401); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(given("--port"))), Handler).serve_forever()
"""


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A folder with the stubs and a recipe whose run goes to `tmp_path`/run."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "recipe.yaml").write_text(f"seed: 1\noutput: '{tmp_path}/run'  # here\n")
    return tmp_path


def run(bench: Path, script: str, *arguments: str, code: int = 0, **variables: str) -> str:
    """Standard output (error, where the exit code is another than 0) of a script among the stubs."""
    environment = {"PATH": f"{bench}:{os.environ['PATH']}", "HOME": str(bench)} | variables
    command = ["bash", str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def flag(said: str, name: str) -> str:
    lines = said.splitlines()
    return lines[lines.index(name) + 1]


def test_one_node(bench: Path) -> None:
    said = run(bench, "one_node.sh", str(bench / "recipe.yaml"), "train.steps=2", RANKS="3")
    lines = said.splitlines()
    assert "--standalone" in lines and flag(said, "--nproc-per-node") == "3"
    assert flag(said, "--tee") == "0:3,1:2,2:2" and flag(said, "--redirects") == "3"
    assert flag(said, "--log-dir") == f"{bench}/run/logs/torchrun/here" and (bench / "run/logs/torchrun/here").is_dir()
    command = ["-m", "megatron_hdpo", "train", str(bench / "recipe.yaml"), "train.steps=2"]
    assert lines[lines.index("-m") : lines.index("-m") + 5] == command
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in lines and "NCCL_DEBUG=WARN" in lines


def test_what_is_set_already_is_kept_and_the_last_output_counts(bench: Path) -> None:
    arguments = [str(bench / "recipe.yaml"), f"output={bench}/a", f"output={bench}/b"]
    said = run(bench, "one_node.sh", *arguments, NCCL_DEBUG="INFO")
    assert flag(said, "--log-dir") == f"{bench}/b/logs/torchrun/here"
    assert "NCCL_DEBUG=INFO" in said and "NCCL_DEBUG=WARN" not in said


def test_several_nodes(bench: Path) -> None:
    variables = {"NODES": "4", "HEAD": "node0:29400", "NODE_INTERFACE": "ib0", "NODE_HCA": "mlx5_0", "REJOIN_S": "30"}
    said = run(bench, "several_nodes.sh", str(bench / "recipe.yaml"), **variables)
    assert (flag(said, "--nnodes"), flag(said, "--rdzv-endpoint")) == ("4", "node0:29400")
    assert flag(said, "--rdzv-conf") == "keep_alive_interval=10,keep_alive_max_attempt=3"
    assert flag(said, "--max-restarts") == "3" and flag(said, "--rdzv-backend") == "c10d"
    assert {"NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0", "NCCL_IB_HCA=mlx5_0"} <= set(said.splitlines())
    assert "--local-addr" not in said and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said


@pytest.mark.parametrize("script", ["several_nodes.sh", "train_on_servers.sh", "servers.sh"])
def test_a_missing_variable_is_named(bench: Path, script: str) -> None:
    assert "set " in run(bench, script, str(bench / "recipe.yaml"), code=2)


@pytest.mark.parametrize(
    ("variables", "head", "nodes"),
    [
        ({"MASTER_ADDR": "job-0", "MASTER_PORT": "23456", "PET_NNODES": "2", "RANK": "1"}, "job-0:23456", 2),
        ({"MASTER_ADDR": "job-0", "MASTER_PORT": "23456", "WORLD_SIZE": "3"}, "job-0:23456", 3),
        ({"PET_RDZV_ENDPOINT": "job-0:23456", "PET_NNODES": "4", "PET_NODE_RANK": "2"}, "job-0:23456", 4),
        ({"JOB_COMPLETION_INDEX": "3", "STUB_HOST": "my-3", "SERVICE": "pods", "NODES": "5"}, "my-0.pods:29400", 5),
    ],
    ids=["PyTorchJob", "older PyTorchJob", "elastic PyTorchJob", "indexed Job"],
)  # fmt: skip
def test_kubernetes(bench: Path, variables: dict[str, str], head: str, nodes: int) -> None:
    said = run(bench, "kubernetes.sh", str(bench / "recipe.yaml"), **variables)
    assert (flag(said, "--rdzv-endpoint"), flag(said, "--nnodes")) == (head, str(nodes))
    assert flag(said, "--local-addr") == "10.0.0.5"
    assert not any(line.startswith(("RANK=", "WORLD", "PET")) for line in said.splitlines())


def slurm(bench: Path, **more: str) -> str:
    variables = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[7-9]", "SLURM_JOB_ID": "123", **more}
    return run(bench, "slurm.sbatch", str(bench / "recipe.yaml"), "seed=2", **variables)


def test_slurm_meets_at_the_first_node(bench: Path) -> None:
    said = slurm(bench, SLURM_GPUS_ON_NODE="4")
    assert "--nodelist node7,node8,node9" in said
    assert (flag(said, "--rdzv-endpoint"), flag(said, "--nnodes")) == ("node7:20123", "3")
    assert (flag(said, "--nproc-per-node"), flag(said, "--rdzv-id")) == ("4", "123")


def test_slurm_trains_in_a_container_on_request(bench: Path) -> None:
    flags = f"--container-image image.sqsh --container-mounts {ROOT}:{ROOT} --container-workdir {ROOT}"
    assert f" {flags} examples/cluster/several_nodes.sh" in slurm(bench, CONTAINER="image.sqsh")
    assert "--container-mounts /data:/data " in slurm(bench, CONTAINER="image.sqsh", MOUNTS="/data:/data")
    assert "--container" not in slurm(bench)


def test_a_script_runs_in_the_folder_that_it_is_called_from(bench: Path) -> None:
    """A recipe's paths start there, wherever the scripts are."""
    environment = {"PATH": f"{bench}:{os.environ['PATH']}", "HOME": str(bench), "NODES": "2", "HEAD": "a:1"}
    (bench / "recipe.yaml").write_text("output: runs/here\n")
    for script in ("one_node.sh", "several_nodes.sh", "kubernetes.sh"):
        command = ["bash", str(SCRIPTS / script), "recipe.yaml"]
        done = subprocess.run(command, env=environment, cwd=bench, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and flag(done.stdout, "--log-dir") == "runs/here/logs/torchrun/here", done.stderr
        assert (bench / "runs/here/logs/torchrun/here").is_dir()


def test_slurm_with_server_nodes_hands_the_addresses_over(bench: Path) -> None:
    """A stand-in for SGLang answers; the trainer is started when it does, and the servers end with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (bench / "server.py").write_text(SERVER)
    server = f'exec {sys.executable} {bench}/server.py "$@"'
    (bench / "python").write_text(f'#!/usr/bin/env bash\n[ "$1" = -c ] || {server}\n')  # -c asks whether it has SGLang
    (bench / "python").chmod(0o755)
    urls, key = ROOT / "slurm-123.urls", ROOT / "slurm-123.urls.key"
    try:
        variables = {"SERVER_NODES": "1", "MODEL": "m", "GPUS": "2", "TENSOR_PARALLEL": "2", "PORT": str(port)}
        said = slurm(bench, NODE_ADDRESS="127.0.0.1", **variables)
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        secret = key.read_text()
    finally:
        urls.unlink(missing_ok=True)
        key.unlink(missing_ok=True)
        for log in (urls.parent / f"{urls.name}.logs").glob("*"):
            log.unlink()
        (urls.parent / f"{urls.name}.logs").rmdir()
    assert (flag(said, "--rdzv-endpoint"), flag(said, "--nnodes")) == ("node8:20123", "2")
    assert "srun --nodes 1 --ntasks-per-node 1 --nodelist node7 examples/cluster/servers.sh" in said
    lines = said.splitlines()
    handed = [
        "rollout.engine=sglang",
        "rollout.sglang.placement=given",
        f"rollout.sglang.urls=[http://127.0.0.1:{port}]",
        "rollout.sglang.api_key_variable=SERVER_KEY",
    ]
    assert lines[lines.index("seed=2") + 1 :][:4] == handed
    assert len(secret) == 64 and [line for line in lines if secret in line] == [f"SERVER_KEY={secret}"]
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", port)) != 0, "the server outlived the job"


@pytest.mark.parametrize(
    ("name", "gpu", "nodes", "server_gpus"),
    [("qwen2.5-7b", "h100", 2, 0), ("qwen2.5-32b", "h100", 4, 0), ("qwen2.5-72b", "h100", 8, 0),
     ("qwen3-235b-a22b", "h200", 16, 64)],
)  # fmt: skip
def test_recipes_for_clusters_fit(name: str, gpu: str, nodes: int, server_gpus: int) -> None:
    recipe = load_recipe(ROOT / "examples" / name / "hdpo.yaml")
    guesses = Guesses(rollout_gpus=server_gpus)
    cluster = cluster_of(gpu, nodes, 8)
    layout = layout_of(recipe, cluster.gpus - server_gpus)
    planned = plan(architecture_of(name), cluster, layout, workload_of(recipe, guesses), rollouts_of(recipe, guesses))
    assert planned.fits, planned

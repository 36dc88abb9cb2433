"""What is wrong with servers is one clear message before anything is trained, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Ended, run_command, run_world
from fault_proxy import FaultProxy, changed, status
from recipes import Tree, make_model, small_recipe
from server_tools import fake_config, servers_under, wait_until

NOWHERE = "http://127.0.0.1:9"


def recipe(model: Path, output: Path, sglang: dict[str, Any], **rollout: Any) -> Tree:
    tree = small_recipe(model, output)
    tree["rollout"] |= {"engine": "sglang", "sglang": sglang} | rollout
    return tree


def train(tree: Tree, ranks: int = 1) -> Ended:
    file = Path(tree["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    return run_command("train", file, ranks=ranks)


def refusal(ended: Ended) -> str:
    """The one message; fails on a traceback, on a second message and on a run that went on."""
    errors = "".join(ended.stderr)
    assert set(ended.codes) == {2} and "Traceback" not in ended.text, f"{ended.codes}\n{ended.text}"
    assert errors.count("Error: ") == 1, errors
    return errors


RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "fp8 on a CPU": ({"servers": {"quantization": "fp8"}}, {}, "quantization='fp8' needs a GPU"),
    "memory saver on a CPU": ({"servers": {"memory_saver": True}}, {}, "memory_saver=True needs a GPU"),
    "a flag that spoils": (
        {"servers": {"extra_args": {"dp": 2}}},
        {},
        "extra_args.dp=2: SGLang takes new weights only with",
    ),
    "urls without given": ({"urls": [NOWHERE]}, {}, "with placement=given, and only then"),
    "given without urls": ({"placement": "given"}, {}, "name the servers' addresses with placement=given"),
    "an address twice": ({"placement": "given", "urls": [NOWHERE] * 2}, {}, "each may be named once"),
    "a router alone": ({"router": NOWHERE}, {}, "router: needs placement=given"),
    "gpus without separate": ({"gpus": [1]}, {}, "with placement=separate, and only then"),
    "ahead, embedded": ({}, {"engine": "embedded", "ahead": 1}, "rollout.ahead: needs rollout.engine=sglang"),
    "an early stop, embedded": ({}, {"engine": "embedded", "stop_at_reward": 1}, "stop_at_reward: needs rollout.eng"),
    "a short context": ({"servers": {"context_length": 41}}, {}, "context_length: 41 cannot hold data.prompts.max_"),
    "a small cache": ({"servers": {"max_total_tokens": 41}}, {}, "tokens 32 + rollout.max_new_tokens 8, together 40"),
    "heads that ranks do not divide": ({"servers": {"tensor_parallel": 4}}, {}, "do not divide the model's 2 key-val"),
    "no interpreter": ({"servers": {"python": "/nowhere/python"}}, {}, "/nowhere/python does not run"),
    "no SGLang there": ({"servers": {"python": sys.executable}}, {}, "has no SGLang; install `megatron-hdpo[sglang]`"),
    "nothing listens": ({"placement": "given", "urls": [NOWHERE]}, {}, f"{NOWHERE}/server_info: no answer"),
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_that_are_refused(name: str, tiny_model: Path, tmp_path: Path) -> None:
    sglang, rollout, words = RECIPES[name]
    message = refusal(train(recipe(tiny_model, tmp_path / "run", sglang, **rollout)))
    assert words in message and len(message) < 700, message
    assert not (tmp_path / "run" / "recipe.yaml").exists(), "the run has not begun"


def test_an_error_of_one_rank_is_said_once_and_ends_all(tiny_model: Path, tmp_path: Path) -> None:
    tree = recipe(tiny_model, tmp_path / "run", {"placement": "given", "urls": [NOWHERE, "http://127.0.0.1:10"]})
    tree["parallel"] = {"tensor": 2}
    assert f"{NOWHERE}/server_info: no answer" in refusal(train(tree, ranks=2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "0.4.1"}, "is SGLang 0.4.1; 0.5.15 or newer is needed"),
        ({"dp_size": 2}, "it was started with dp-size=2: SGLang takes new weights only with one"),
        (
            {"max_total_num_tokens": 40, "max_req_input_len": 34},
            "it samples at most 38 tokens of prompt and response together (its key-value cache holds 40), and "
            "data.prompts.max_privileged_tokens 32 + rollout.max_new_tokens 8 are 40: lower one of them",
        ),
    ],
    ids=["too old", "data parallel", "a small cache"],
)
@pytest.mark.fault(
    "a server that is too old, has data-parallel copies, or too small a cache",
    phase="start",
    seen="one line with its address and the reason, exit code 2",
    lost="nothing",
)
def test_servers_that_cannot_be_driven(proxy: FaultProxy, tmp_path: Path, change: Any, words: str) -> None:
    proxy.faults["/server_info"] = [changed(lambda answer: answer | change)]
    model = Path(proxy_model(proxy))
    message = refusal(train(recipe(model, tmp_path / "run", {"placement": "given", "urls": [proxy.url]})))
    assert words in message and proxy.url in message


def proxy_model(proxy: FaultProxy) -> str:
    import json
    import urllib.request

    return json.load(urllib.request.urlopen(proxy.target + "/model_info"))["tokenizer_path"]


NOT_HERE = {"model_path": "/elsewhere/model", "tokenizer_path": "/elsewhere/model"}
SIZES: dict[str, tuple[dict[str, Any], str, str]] = {
    "wider": ({"hidden": 64}, "hidden_size 32, not 64", ""),
    "another vocabulary": ({"characters": "0123456789+=#-abc"}, "vocab_size 17, not 20", ""),
    "deeper": ({"layers": 3}, "num_layers 2, not 3", "it has no model.layers.2."),
    "shallower": ({"layers": 1}, "num_layers 2, not 1", "it has model.layers.1."),
    "another family": ({"family": "qwen2"}, "family llama, not qwen2", "it has no model.layers.0.self_attn.qkv_proj.b"),
    "a tied head": ({"tied": True}, "tied False, not True", "it has lm_head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("seen", [True, False], ids=["folder seen", "folder elsewhere"])
@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.fault(
    "a server of another model",
    phase="start",
    seen="`serves another model` with the sizes, exit code 2",
    lost="nothing",
)
def test_servers_of_another_model(proxy: FaultProxy, tmp_path: Path, name: str, seen: bool) -> None:
    """Weights of other shapes would end the server."""
    sizes, by_folder, by_names = SIZES[name]
    if not seen and not by_names:
        pytest.skip("names of parameters do not tell sizes")
    model = make_model(tmp_path / "model", **({"characters": "0123456789+=#-"} | sizes))
    if not seen:
        proxy.faults["/server_info"] = [changed(lambda answer: answer | NOT_HERE)]
    message = refusal(train(recipe(model, tmp_path / "run", {"placement": "given", "urls": [proxy.url]})))
    assert f"{proxy.url} serves another model" in message and (by_folder if seen else by_names) in message, message
    assert "/begin_weight_update" not in {path for path, bodies in proxy.asked.items() if any(bodies)}
    assert "/update_weights_from_tensor" not in proxy.asked


def test_servers_end_with_a_run_that_goes_wrong(tiny_model: Path, tmp_path: Path) -> None:
    """The stand-in answers no /server_info: what was started is ended before the message is said."""
    servers = yaml.safe_load(fake_config(tmp_path).model_dump_json(exclude_defaults=True))
    tree = recipe(tiny_model, tmp_path / "run", {"replicas": 2, "servers": servers})
    assert "/server_info: status 401" in refusal(train(tree))
    assert len(list(tmp_path.glob("run/logs/node0/sglang_*.log"))) == 2
    assert wait_until(lambda: not servers_under(tmp_path)), servers_under(tmp_path)


def train_and_die(file: str) -> None:
    from megatron_hdpo import cli
    from megatron_hdpo.rollout.sglang import engine

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    engine.SGLangEngine._connect = die  # type: ignore
    cli.main(["train", file])


@pytest.mark.parametrize("behaviour", ["", "stubborn", "escape"])
@pytest.mark.fault("a rank is killed", phase="all", seen="no server of it is left", lost="nothing")
def test_servers_end_with_a_rank_that_is_killed(tiny_model: Path, tmp_path: Path, behaviour: str) -> None:
    servers = yaml.safe_load(fake_config(tmp_path, behaviour).model_dump_json(exclude_defaults=True))
    tree = recipe(tiny_model, tmp_path / "run", {"servers": servers})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    ended = run_world(1, train_and_die, str(file))
    assert ended.codes == [-signal.SIGKILL], ended.text
    assert (tmp_path / "run" / "logs" / "node0" / "sglang_0.log").exists()
    assert wait_until(lambda: not servers_under(tmp_path)), servers_under(tmp_path)


@pytest.mark.fault(
    "no server ever takes weights",
    phase="start",
    seen="`weight sync: no server took the weights`, exit code 2",
    lost="nothing",
)
def test_a_server_that_never_takes_weights_ends_the_run(proxy: FaultProxy, tmp_path: Path) -> None:
    model = Path(proxy_model(proxy))
    proxy.faults["/update_weights_from_tensor"] = [status(500)] * 9
    tree = recipe(model, tmp_path / "run", {"placement": "given", "urls": [proxy.url], "health_interval_s": 0.3})
    message = refusal(train(tree))
    assert "TrainingError: weight sync: no server took the weights of version 0" in message and "injected" in message

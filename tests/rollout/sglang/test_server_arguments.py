"""The table of arguments: each one that would spoil a run is refused, in a recipe and on a given server."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from server_tools import LiveServer

from megatron_hdpo.rollout.sglang.servers.arguments import (
    REFUSED_VARIABLES,
    RULES,
    Rule,
    problem_of_server,
    problems_of_flags,
)
from megatron_hdpo.rollout.sglang.servers.command import server_environment
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig

PAGE = Path(__file__).parents[3] / "docs" / "rollouts-on-sglang.md"


def spoiling(rule: Rule) -> Any:
    """A value that the rule forbids, such as a user might give."""
    if rule.names[0] == "speculative-algorithm":
        return "NGRAM" if rule.device == "cpu" else "EAGLE"
    return "2"


@pytest.mark.parametrize("rule", RULES, ids=[f"{rule.names[0]}-{rule.device or 'any'}" for rule in RULES])
def test_each_row_of_the_table_is_refused_under_all_its_names(rule: Rule) -> None:
    value, device = spoiling(rule), rule.device or "cuda"
    for name in rule.names:
        for spelled in (name, f"--{name}", name.replace("-", "_")):
            with pytest.raises(ValueError) as refused:
                ServerConfig(extra_args={spelled: value}).check(device)
            assert str(refused.value) == f"SGLang servers: extra_args.{spelled}={value}: {rule.reason}"
    said = {"device": device, rule.names[0].replace("-", "_"): value}
    assert problem_of_server(said) == (f"it was started with {rule.names[0]}={value}: {rule.reason}" * rule.reported)


@pytest.mark.parametrize(
    "flags",
    [
        {"speculative-algorithm": "NGRAM", "speculative_num_draft_tokens": 8},
        {"speculative-accept-threshold-single": 1.0, "speculative-accept-threshold-acc": 1},
        {"ep-size": 2, "dp": 1, "pp_size": "1", "nnodes": 1},
        {"disaggregation-mode": "null"},
        {"enable-hierarchical-cache": True, "schedule-policy": "lpm", "cuda-graph-bs": ["1", "8"]},
    ],
)
def test_what_does_no_harm_is_passed_on(flags: dict[str, Any]) -> None:
    ServerConfig(extra_args=flags).check("cuda")
    assert not problem_of_server({name.replace("-", "_"): value for name, value in flags.items()})


def test_speculative_decoding_on_a_cpu_would_not_sample() -> None:
    with pytest.raises(ValueError, match="only the likeliest tokens, whatever the temperature"):
        ServerConfig(extra_args={"speculative-algorithm": "NGRAM"}).check("cpu")
    assert problem_of_server({"speculative_algorithm": "NGRAM", "device": "cpu"})
    assert not problem_of_server({"speculative_algorithm": "NGRAM", "device": "cuda"})


@pytest.mark.parametrize("short", ["speculative-algo", "data-par", "expert_parallel", "--disaggregation-m", "mem-frac"])
def test_a_flag_may_not_be_abbreviated_past_the_table(short: str) -> None:
    """The servers' own command line takes the beginning of a flag for the whole of it."""
    assert [problem.partition(";")[2] for problem in problems_of_flags({short: "x"}, "cuda")] == [" write it in full"]


@pytest.mark.parametrize("name", list(REFUSED_VARIABLES))
def test_variables_that_spoil_samples_do_not_reach_a_server(name: str) -> None:
    with pytest.raises(ValueError, match=rf"environment\.{name}: .*; take it out"):
        ServerConfig(environment={name: "1"}).check("cuda")
    assert server_environment(ServerConfig(), "cuda", {name: "1", "HOME": "/h"}) == {"HOME": "/h"}


def test_a_real_server_reports_every_argument_of_the_table(sglang_server: LiveServer) -> None:
    """A name that a new version reports no more would no longer be checked."""
    with urllib.request.urlopen(f"{sglang_server.url}/server_info") as answer:
        said = json.load(answer)
    assert problem_of_server(said) == ""
    fields = {rule.names[0].replace("-", "_") for rule in RULES if rule.reported}
    assert fields <= said.keys(), f"not reported: {fields - said.keys()}"
    for rule in RULES:
        if rule.reported and rule.device in (None, "cpu"):
            assert problem_of_server(said | {rule.names[0].replace("-", "_"): spoiling(rule)})


def test_the_page_lists_every_argument_of_the_table() -> None:
    page = PAGE.read_text()
    assert [rule.names[0] for rule in RULES if f"`{rule.names[0]}`" not in page] == []
    assert [name for name in REFUSED_VARIABLES if f"`{name}`" not in page] == []

"""The client of a reward service: exact values through every fault that passes, and a cause for every other one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_service import Fault, StandInService, body, close, die_midway, free_port, hang, status, value_of

from megatron_hdpo.rewards import service as service_module
from megatron_hdpo.rewards.functions import HttpService
from megatron_hdpo.rewards.judgement import Judgement
from megatron_hdpo.rewards.service import RewardService
from megatron_hdpo.rewards.service_answers import seconds_to_wait
from megatron_hdpo.types import breaker
from megatron_hdpo.types.loop_thread import LoopThread
from megatron_hdpo.types.problem import Problem

PROBLEM = Problem("sums/7", "sums", "2 + 2?", "4", metadata={"tests": [1, 2], "no json": object()})
SECRET = "s3cr3t-value"
Ask = Callable[..., list[Judgement]]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(service_module, "LONGEST_WAIT_S", 0.05)
    monkeypatch.setattr(service_module, "_POLL_S", 0.01)
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 0.05)


@pytest.fixture
def opened() -> Iterator[Callable[..., RewardService]]:
    """Makes the client of an address; all end with the test."""
    thread, made = LoopThread("test"), []

    def make(url: str, **settings: Any) -> RewardService:
        made.append(RewardService(HttpService(url=url, name="judge", **settings), thread, {"JUDGE_KEY": SECRET}))
        return made[-1]

    yield make
    for client in made:
        client.close()
    thread.close()


def ask(client: RewardService, responses: list[str]) -> list[Judgement]:
    futures = [client.submit(PROBLEM, response) for response in responses]
    return [future.result(timeout=30) for future in futures]


def once(fault: Fault) -> Callable[[dict[str, Any], int], Fault | None]:
    return lambda request, times: fault if times == 0 else None


def test_values_come_back_and_the_service_sees_the_response(opened: Callable[..., RewardService]) -> None:
    with StandInService(delay_s=0.02).running() as stand_in:
        client = opened(stand_in.url, max_concurrent=4, headers={"X-Team": "maths"})
        threads = threading.active_count()
        responses = [f"response {i}" for i in range(40)]
        futures = [client.submit(PROBLEM, response) for response in responses]
        assert threading.active_count() == threads
        judgements = [future.result(timeout=30) for future in futures]
    assert [j.reward for j in judgements] == [value_of(response) for response in responses]
    assert [j.feedback for j in judgements] == [f"seen {response}" for response in responses]
    assert all(j.error is None and j.seconds > 0 for j in judgements)
    assert stand_in.most_at_once == 4
    samples = {request.pop("sample") for request in stand_in.asked}
    assert len(samples) == 40
    assert sorted(stand_in.asked, key=lambda r: responses.index(r["response"])) == [
        {
            "id": "sums/7",
            "task": "sums",
            "question": "2 + 2?",
            "answer": "4",
            "response": response,
            "metadata": {"tests": [1, 2]},
        }
        for response in responses
    ]
    assert all(headers["X-Team"] == "maths" for headers in stand_in.headers)


@pytest.mark.parametrize(
    "fault",
    [status(500), status(503, "loading"), status(408), status(429, Retry_After="0"), close, die_midway, hang],
    ids=["500", "503", "408", "429", "close", "dies midway", "slow"],
)
@pytest.mark.fault(
    "a reward service fails once: no answer in time, a closed connection, half an answer, status 408, 429 or 5xx",
    phase="checking",
    seen="nothing",
    lost="nothing",
)
def test_what_passes_is_asked_for_again(opened: Callable[..., RewardService], fault: Fault) -> None:
    with StandInService(once(fault)).running() as stand_in:
        judgements = ask(opened(stand_in.url, timeout_s=0.5), ["a", "b"])
    assert [j.reward for j in judgements] == [value_of("a"), value_of("b")]
    by_response = {r["response"]: r["sample"] for r in stand_in.asked}
    assert sorted((r["response"], r["sample"]) for r in stand_in.asked) == sorted(2 * list(by_response.items()))


@pytest.mark.fault(
    "a reward service asks to wait (status 429 with Retry-After)",
    phase="checking",
    seen="nothing",
    lost="nothing",
)
def test_retry_after_is_kept_and_uses_up_no_retry(opened: Callable[..., RewardService]) -> None:
    times: list[float] = []

    def fault(request: dict[str, Any], asked: int) -> Fault | None:
        times.append(time.monotonic())
        return status(429, Retry_After="1") if asked < 2 else None

    with StandInService(fault).running() as stand_in:
        (judgement,) = ask(opened(stand_in.url, max_retries=0), ["a"])
    assert judgement.reward == value_of("a")
    assert len(times) == 3 and all(later - earlier >= 1 for earlier, later in pairwise(times))


def test_a_wait_beyond_the_deadline_is_not_begun(opened: Callable[..., RewardService]) -> None:
    with StandInService(lambda request, times: status(429, "slow down", Retry_After="600")).running() as stand_in:
        (judgement,) = ask(opened(stand_in.url, deadline_s=5), ["a"])
    assert (judgement.reward, judgement.error) == (None, "status 429, asks to wait for 600 s: slow down")
    assert judgement.seconds < 3


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (status(400, "no key"), "status 400: no key"),
        (status(404), "status 404"),
        (status(302, Location="/elsewhere"), "status 302"),
        (body("<html>"), "the answer is not JSON"),
        (body(b"\xff\xfe"), "the answer is not JSON"),
        (body(""), "the answer is not JSON"),
        (body('{"reward": NaN}'), "the answer is not JSON"),
        (body('{"reward": 1e999}'), "infinity"),
        (body('{"reward": ' + "9" * 400 + "}"), "infinity"),
        (body('{"reward": true}'), "its reward is no finite number"),
        (body('{"reward": "1"}'), "its reward is no finite number"),
        (body('{"reward": null}'), "its reward is no finite number"),
        (body('{"score": 1}'), 'no object with a "reward": {"score": 1}'),
        (body("[1]"), "no object"),
        (body("1"), "no object"),
        (body('{"reward": 1, "feedback": 2}'), "its feedback is neither text nor null"),
        (body('{"reward": 1, "feedback": "' + "x" * (1 << 20) + '"}'), "longer than 1048576 bytes"),
    ],
)
@pytest.mark.fault(
    "a reward service refuses (status 4xx), or its answer holds no number",
    phase="checking",
    seen="`reward/<name>/failed`, and each cause once in the log",
    lost="that sample; it is no reward of 0",
)
def test_what_cannot_get_better_fails_at_once_with_its_cause(
    opened: Callable[..., RewardService], fault: Fault, error: str
) -> None:
    with StandInService(lambda request, times: fault).running() as stand_in:
        (judgement,) = ask(opened(stand_in.url), ["a"])
    assert judgement.reward is None and error in (judgement.error or "")
    assert len(stand_in.asked) == 1 and len(judgement.error or "") < 500


@pytest.mark.fault(
    "a reward service fails at every try, or never answers",
    phase="checking",
    seen="`reward/<name>/failed`, and each cause once in the log",
    lost="that sample; it is no reward of 0",
)
def test_retries_and_time_are_bounded(opened: Callable[..., RewardService]) -> None:
    with StandInService(lambda request, times: status(500, "broken")).running() as stand_in:
        (judgement,) = ask(opened(stand_in.url, max_retries=2), ["a"])
        assert (judgement.reward, len(stand_in.asked)) == (None, 3)
        assert judgement.error == "status 500: broken (after 3 requests in 0 s)"
    with StandInService(lambda request, times: hang).running() as stand_in:
        begin = time.monotonic()
        (judgement,) = ask(opened(stand_in.url, timeout_s=0.2, deadline_s=0.7, max_retries=99), ["a"])
        assert judgement.reward is None and "no answer within" in (judgement.error or "")
        assert 1 < len(stand_in.asked) < 5 and time.monotonic() - begin < 5


@pytest.mark.fault(
    "a reward service is restarted",
    phase="checking",
    seen="`reward service ... is out of order`, then `answers again`",
    lost="nothing: samples wait up to `deadline_s`",
)
def test_samples_wait_for_a_service_that_is_restarted(opened: Callable[..., RewardService], caplog: Any) -> None:
    caplog.set_level("INFO")
    stand_in = StandInService(port=free_port())
    responses = [f"{i}" for i in range(30)]
    client = opened(stand_in.url, max_concurrent=5, max_retries=5, deadline_s=20)
    futures = [client.submit(PROBLEM, response) for response in responses]
    while client._breaker.state == "closed":
        time.sleep(0.01)
    time.sleep(0.3)
    assert not any(future.done() for future in futures)
    with stand_in.running():
        judgements = [future.result(timeout=30) for future in futures]
    assert [j.reward for j in judgements] == [value_of(response) for response in responses]
    assert "is out of order: no answer" in caplog.text and "answers again" in caplog.text


@pytest.mark.fault(
    "a reward service is gone for good",
    phase="checking",
    seen="`is out of order`, `reward/<name>/failed`; after `rollout.max_empty_steps` an error, exit code 2",
    lost="the samples of that time; the run waits `deadline_s` once, not for each of them",
)
def test_an_outage_costs_its_deadline_once(opened: Callable[..., RewardService]) -> None:
    client = opened(f"http://127.0.0.1:{free_port()}/judge", max_concurrent=2, deadline_s=1)
    begin = time.monotonic()
    judgements = ask(client, [f"{i}" for i in range(50)])
    assert all(j.reward is None and "no answer: " in (j.error or "") for j in judgements)
    assert time.monotonic() - begin < 10  # each of 25 turns would wait a second


def test_a_hanging_service_does_not_hold_up_the_end(opened: Callable[..., RewardService]) -> None:
    with StandInService(lambda request, times: hang).running() as stand_in:
        client = opened(stand_in.url, max_concurrent=2)
        futures = [client.submit(PROBLEM, f"{i}") for i in range(6)]
        while len(stand_in.asked) < 2:
            time.sleep(0.01)
        begin = time.monotonic()
        client.close()
        errors = {future.result(timeout=5).error for future in futures}
        assert time.monotonic() - begin < 3
        assert errors == {"the service was closed before it answered"}


def test_no_key_is_shown(opened: Callable[..., RewardService], caplog: Any) -> None:
    caplog.set_level("DEBUG")

    def echo(request: dict[str, Any], times: int) -> Fault:
        return status(401, f"unknown key {stand_in.headers[-1]['Authorization']} {stand_in.headers[-1]['X-Key']}")

    with StandInService(echo).running() as stand_in:
        clients = [
            opened(stand_in.url, api_key=SECRET, headers={"X-Key": SECRET}),
            opened(stand_in.url, api_key_variable="JUDGE_KEY", headers={"X-Key": SECRET}),
        ]
        errors = [ask(client, ["a"])[0].error or "" for client in clients]
    assert errors == ["status 401: unknown key Bearer *** ***"] * 2
    assert [headers["Authorization"] for headers in stand_in.headers] == [f"Bearer {SECRET}"] * 2
    assert SECRET not in caplog.text + repr(clients[0].config)
    with pytest.raises(ValueError, match="api_key_variable: the environment variable NO_KEY is not set"):
        opened(stand_in.url, api_key_variable="NO_KEY")


def test_the_service_is_asked_whether_it_is_there(opened: Callable[..., RewardService]) -> None:
    with StandInService().running() as stand_in:
        opened(stand_in.url).check()
        stand_in.health = 404
        with pytest.raises(ValueError, match=r"^http://127.0.0.1:\d+/health: status 404$"):
            opened(stand_in.url).check()
        opened(stand_in.url, health=None).check()
        assert not stand_in.asked
    with pytest.raises(ValueError, match=r"^http://127.0.0.1:\d+/health: no answer: "):
        opened(stand_in.url).check()


@given(faults=st.lists(st.lists(st.sampled_from(["500", "429", "close"]), max_size=3), min_size=1, max_size=12))
@settings(max_examples=10, deadline=None)
def test_nothing_is_lost_whatever_fails_meanwhile(faults: list[list[str]]) -> None:
    kinds = {"500": status(500), "429": status(429), "close": close}

    def fault(request: dict[str, Any], times: int) -> Fault | None:
        planned = faults[int(request["response"])]
        return kinds[planned[times]] if times < len(planned) else None

    thread = LoopThread("test")
    with StandInService(fault).running() as stand_in:
        client = RewardService(HttpService(url=stand_in.url, max_retries=3), thread, {})
        judgements = ask(client, [f"{i}" for i in range(len(faults))])
        client.close()
    thread.close()
    assert [j.reward for j in judgements] == [value_of(f"{i}") for i in range(len(faults))]
    assert len(stand_in.asked) == sum(len(planned) + 1 for planned in faults)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        (formatdate(1_000_090, usegmt=True), 90.0),
        (formatdate(999_000, usegmt=True), 0.0),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(text: str, seconds: float | None) -> None:
    assert seconds_to_wait(text, now=1_000_000) == seconds

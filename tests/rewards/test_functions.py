"""The reward as a weighted sum: exact, whole or not at all, and what its functions are worth."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hostile_task import PROBLEM, HostileTask
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_service import Fault, StandInService, free_port, status, value_of

from megatron_hdpo.config import RecipeError, parse_recipe
from megatron_hdpo.config.check import check_sections
from megatron_hdpo.config.secrets import redacted
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.functions import AnswerFormat, OverlongPenalty, RewardFunction, TaskScore, deciding
from megatron_hdpo.rewards.judgement import Judgement, combined
from megatron_hdpo.rewards.pool import RewardPool, RewardPoolError

SECRET = "s3cr3t-value"


def recipe(*functions: dict[str, Any]) -> dict[str, Any]:
    return {
        "output": "runs/x",
        "model": {"path": "model"},
        "data": {"train": [{"kind": "digit_sums", "lengths": [2]}]},
        "objective": {"name": "grpo"},
        "reward": {"functions": list(functions)},
    }


def pool_of(*functions: dict[str, Any]) -> RewardPool:
    config = RewardConfig.model_validate({"functions": list(functions), "workers": 1, "max_retries": 0})
    return RewardPool([HostileTask()], config)


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandInService]:
    def refuses(request: dict[str, Any], times: int) -> Fault | None:
        return status(400, "no") if request["response"] == "reward:0.75" else None

    with StandInService(refuses).running() as service:
        yield service


@pytest.fixture(scope="module")
def pool(stand_in: StandInService) -> Iterator[RewardPool]:
    functions = (
        {"kind": "task"},
        {"kind": "format", "pattern": ":0", "weight": 0.25},
        {"kind": "length", "max_tokens": 8, "buffer_tokens": 4, "weight": 0.5},
        {"kind": "http", "name": "judge", "url": stand_in.url, "weight": -2.0},
    )
    with pool_of(*functions) as made:
        made.check()
        yield made


@pytest.mark.parametrize(("response", "tokens"), [("reward:0", 3), ("reward:1", 6), ("reward:0.5", 99)])
def test_the_reward_is_the_sum_of_all_parts(pool: RewardPool, response: str, tokens: int) -> None:
    judgement = pool.submit(PROBLEM, response, tokens).result(timeout=60)
    parts = {
        "task": float(response.partition(":")[2]),
        "format": float(":0" in response),
        "length": {3: 0.0, 6: -0.5, 99: -1.0}[tokens],
        "judge": value_of(response),
    }
    assert judgement.components == parts and judgement.error is None
    expected = parts["task"] + parts["format"] / 4 + parts["length"] / 2 - 2 * parts["judge"]
    assert judgement.reward == expected  # all of these are exact in binary
    assert (judgement.decided_by, judgement.failed) == ("task", "")
    said = f"seen {response}"
    assert judgement.feedback == (f"no\n\n{said}" if response == "reward:0" else said)


@pytest.mark.parametrize(
    ("response", "failed", "error"),
    [
        ("raise", "task", "reward function 'task': Unpicklable: one"),
        ("reward:0.75", "judge", "reward function 'judge': status 400: no"),
    ],
)
def test_a_part_that_fails_fails_the_whole(pool: RewardPool, response: str, failed: str, error: str) -> None:
    judgement = pool.submit(PROBLEM, response, 1).result(timeout=60)
    assert (judgement.reward, judgement.failed) == (None, failed)
    assert error in (judgement.error or "")
    assert judgement.components == {} and not judgement.ends_run


def test_a_length_that_nobody_knows_is_no_length_of_0(pool: RewardPool) -> None:
    judgement = pool.submit(PROBLEM, "reward:1").result(timeout=60)
    assert (judgement.reward, judgement.failed) == (None, "length")


numbers = st.floats(-1e6, 1e6)


@given(
    parts=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5),
    decisive=st.sampled_from([0.0, 0.25, 1.0]),
    weight=numbers,
)
@settings(max_examples=100, deadline=None)
def test_the_sum_is_the_exact_one_rounded_once(
    parts: list[tuple[float, float]], decisive: float, weight: float
) -> None:
    functions: list[RewardFunction] = [TaskScore(weight=weight)]
    functions += [AnswerFormat(name=f"f{i}", weight=w) for i, (w, _) in enumerate(parts)]
    judgements = [Judgement(decisive, None, 0.5)] + [Judgement(value, None, i) for i, (_, value) in enumerate(parts)]
    found = combined(functions, judgements)
    terms = [(weight, decisive), *parts]
    exact = sum(Fraction(w * v) for w, v in terms)  # each product is rounded, their sum once
    assert found.reward == float(exact)
    assert found.components["task"] == decisive and found.seconds == max(0.5, len(parts) - 1)
    for broken in range(len(functions)):
        judged = [Judgement(None, "why", 0.0) if i == broken else j for i, j in enumerate(judgements)]
        lost = combined(functions, judged)
        name = functions[broken].function_name
        assert (lost.reward, lost.failed, lost.error) == (None, name, f"reward function {name!r}: why")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.5, -0.1])
def test_a_value_that_cannot_be_is_no_reward(value: float) -> None:
    found = combined([TaskScore(), AnswerFormat()], [Judgement(value, None, 0.0), Judgement(1.0, None, 0.0)])
    assert found.reward is None and found.failed == "task" and f"{value:g}" in (found.error or "")


def test_the_run_ends_where_the_recipe_wants_it() -> None:
    functions = [TaskScore(), AnswerFormat(on_failure="stop")]
    ends = [
        combined(functions, [Judgement(a, "why", 0.0), Judgement(b, "why", 0.0)]).ends_run
        for a, b in [(None, 1.0), (1.0, None), (1.0, 1.0)]
    ]
    assert ends == [False, True, False]


@pytest.mark.parametrize(
    ("response", "value"),
    [
        (r"so \boxed{4}", 1.0),
        ("so <answer>4</answer>", 1.0),
        ("so the answer is 4", 0.0),
        ("4", 0.0),
        (r"<think>\boxed{4}</think> well", 0.0),
        (r"\boxed{4", 0.0),
        (r"\boxed{}", 0.0),
        ("", 0.0),
    ],
)
def test_format(response: str, value: float) -> None:
    assert AnswerFormat().score(PROBLEM, response) == value


def test_format_by_a_pattern_is_looked_for_after_the_thoughts() -> None:
    function = AnswerFormat(pattern=r"^Answer: \d+$")
    assert function.score(PROBLEM, "<think>x</think>Answer: 4") == 1.0
    assert function.score(PROBLEM, "<think>Answer: 4</think>4") == 0.0


@given(tokens=st.integers(1, 40), longest=st.integers(1, 20), data=st.data())
def test_the_overlong_penalty_is_the_papers(tokens: int, longest: int, data: Any) -> None:
    cache = data.draw(st.integers(1, longest))
    if tokens <= longest - cache:
        expected = 0.0
    elif tokens <= longest:
        expected = ((longest - cache) - tokens) / cache
    else:
        expected = -1.0
    function = OverlongPenalty(max_tokens=longest, buffer_tokens=cache)
    assert function.value(tokens) == pytest.approx(expected)


TASK, FORMAT = {"kind": "task"}, {"kind": "format"}
JUDGE = {"kind": "http", "name": "judge", "url": "http://judge:8000/score"}


@pytest.mark.parametrize(
    ("functions", "name"),
    [
        ([TASK, FORMAT], "task"),
        ([FORMAT, TASK], "task"),
        ([TASK, JUDGE | {"decides_success": True}], "judge"),
        ([JUDGE], "judge"),
        ([TASK | {"name": "score"}, JUDGE], "score"),
    ],
)
def test_who_decides_on_success(functions: list[dict[str, Any]], name: str) -> None:
    read = parse_recipe(recipe(*functions)).reward.functions
    assert read is not None and deciding(read).function_name == name


OWN = """
from pydantic import Field

from megatron_hdpo.rewards.functions import WorkerFunction

calls = 0


def shortness(problem, response, longest=10):
    if "raise" in response:
        raise RuntimeError("no idea")
    return max(0.0, 1 - len(response) / longest)


class Tenths(WorkerFunction):
    digits: int = Field(ge=1)

    def score(self, problem, response):
        return len(problem.answer) / 10**self.digits


class Abstract(WorkerFunction):
    pass


def says_true(problem, response):
    return True
"""


def test_functions_of_ones_own_run_in_the_workers(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    functions: list[dict[str, Any]] = [
        {"kind": "task"},
        {"kind": f"{tmp_path}/own.py:shortness", "arguments": {"longest": 16}, "weight": 2},
        {"kind": f"{tmp_path}/own.py:Tenths", "digits": 1, "name": "part"},
    ]
    with pool_of(*functions) as made:
        made.check()
        (tmp_path / "own.py").write_text("the file is edited while the run goes on")
        right = made.submit(PROBLEM, "reward:1").result(timeout=60)
        broken = made.submit(PROBLEM, "raise").result(timeout=60)
    assert right.components == {"task": 1.0, "shortness": 0.5, "part": 0.1}
    assert right.reward == pytest.approx(1 + 2 * 0.5 + 0.1)
    assert (broken.reward, broken.failed) == (None, "task")


def test_what_a_function_of_ones_own_returns_must_be_a_number(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    names = {"shortness": "reward function 'shortness': RuntimeError: no idea", "says_true": "bool, not a number"}
    for name, error in names.items():
        own = {"kind": f"{tmp_path}/own.py:{name}", "decides_success": True}
        with pool_of(own) as made:
            judgement = made.submit(PROBLEM, "raise").result(timeout=60)
            assert (judgement.reward, judgement.failed) == (None, name) and error in (judgement.error or "")


@pytest.mark.parametrize(
    ("own", "error"),
    [
        ({"kind": "own.py:nothing"}, "functions.0.kind: own.py has no nothing"),
        ({"kind": "gone.py:shortness"}, "functions.0.kind: there is no file gone.py"),
        ({"kind": "own.py:calls"}, "functions.0.kind: own.py:calls is no reward function: it must be a Python"),
        ({"kind": "own.py:Abstract"}, "functions.0.kind: own.py:Abstract is no reward function yet: it has no score"),
        ({"kind": "own.py:shortness", "arguments": {"longst": 3}}, "own.py:shortness: got an unexpected keyword"),
        ({"kind": "own.py:shortness", "longest": 3}, "functions.0.longest: unknown key"),
        ({"kind": "own.py:Tenths"}, "functions.0.digits: required key is missing"),
        ({"kind": "own.py:Tenths", "digits": 0}, "functions.0.digits: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_function_of_ones_own_is_refused(
    own: dict[str, Any], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as raised:
        parse_recipe(recipe(own))
    assert error in str(raised.value)


@pytest.mark.parametrize(
    ("functions", "error"),
    [
        ([], "reward.functions: name at least one function, or leave the list out"),
        ([JUDGE, FORMAT], "reward.functions: decides_success: set it for the function that tells right from wrong"),
        ([TASK | {"decides_success": True}, JUDGE | {"decides_success": True}], "decides_success: set it for one of"),
        ([TASK, FORMAT, FORMAT], "reward.functions: functions share a name: format; give each its own `name`"),
        ([TASK | {"name": "My score"}], "reward.functions.0.name"),
        ([TASK | {"weight": True}], "reward.functions.0.weight: must be a number"),
        ([TASK | {"weight": float("nan")}], "reward.functions.0.weight"),
        ([TASK, FORMAT | {"pattern": "("}], "reward.functions.1.pattern: is no regular expression"),
        ([TASK, {"kind": "length", "max_tokens": 5, "buffer_tokens": 6}], "buffer_tokens: 6 is more than max_tokens 5"),
        ([TASK, {"kind": "judge"}], "reward.functions.1.kind: judge is not one of task, format, length, http"),
        ([TASK, JUDGE | {"url": "judge:8000"}], "reward.functions.1.url: must be an address such as http://host"),
        ([TASK, JUDGE | {"url": f"http://me:{SECRET}@judge/x"}], "must not hold a user or password"),
        ([TASK, JUDGE | {"url": "/score"}], "url: must be an address"),
        ([TASK, JUDGE | {"api_key": SECRET, "api_key_variable": "KEY"}], "api_key: leave it out, or api_key_variable"),
        ([TASK, JUDGE | {"api_key": [SECRET]}], "reward.functions.1.api_key"),
        ([TASK, JUDGE | {"headers": {"X-Key": [SECRET]}}], "reward.functions.1.headers.X-Key"),
        ([TASK, JUDGE | {"deadline_s": 1e6}], "parallel.silence_minutes: "),
    ],
)
def test_functions_that_cannot_be_are_refused(functions: list[dict[str, Any]], error: str) -> None:
    with pytest.raises(RecipeError) as raised:
        check_sections(parse_recipe(recipe(*functions)))
    assert error in str(raised.value) and SECRET not in str(raised.value)


def test_no_secret_of_a_service_is_written(tmp_path: Path) -> None:
    read = parse_recipe(recipe(TASK, JUDGE | {"api_key": SECRET, "headers": {"X-Team": SECRET}}))
    assert SECRET not in str(redacted(read.model_dump(mode="json")))
    assert SECRET not in repr(read)


@pytest.mark.fault(
    "a reward service is not there, or its key is not set",
    phase="start",
    seen="`reward.functions: <name>: <address>: no answer`, exit code 2",
    lost="nothing",
)
def test_a_service_that_is_not_there_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_hdpo.rewards.service.FIRST_WAIT_S", 0.01)
    gone = JUDGE | {"url": f"http://127.0.0.1:{free_port()}/judge"}
    with (
        pool_of(TASK, gone, gone | {"name": "other", "api_key_variable": "NO_SUCH_KEY"}) as made,
        pytest.raises(RewardPoolError) as raised,
    ):
        made.check()
    first, second = str(raised.value).splitlines()
    assert first.startswith("reward.functions: judge: http://127.0.0.1:") and "/health: no answer: " in first
    assert second == ("reward.functions: other: api_key_variable: the environment variable NO_SUCH_KEY is not set")


def test_without_functions_nothing_is_asked() -> None:
    with RewardPool([HostileTask(prepare_error=True)], RewardConfig(workers=1)) as made:
        made.check()  # would report the task that cannot be prepared

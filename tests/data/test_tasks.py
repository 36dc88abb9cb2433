"""Generated tasks: right by their own scorers, reproducible, without duplicates; and their worked solutions."""

from __future__ import annotations

import pickle
import re

import pytest
from pydantic import TypeAdapter, ValidationError

from megatron_hdpo.data.tasks import TaskConfig
from megatron_hdpo.data.tasks.reasoning_gym import derived_seed
from megatron_hdpo.data.tasks.solutions import SOLUTION_BUILDERS, gsm_symbolic
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport

TASK = TypeAdapter(TaskConfig)


def task(**config):
    return TASK.validate_python(config)


def problems(**config):
    return task(**config).problems(LoadReport())


def test_digit_sums_are_running_totals():
    made = problems(kind="digit_sums", lengths=[2, 5], size=40, seed=7)
    assert [p.level for p in made[:4]] == ["2", "5", "2", "5"]
    for problem in made:
        digits = [int(digit) for digit in problem.question.removesuffix("=").split("+")]
        assert len(digits) == int(problem.level)
        assert problem.solution.split("=") == [str(sum(digits[: i + 1])) for i in range(1, len(digits))]
        assert problem.answer == str(sum(digits))
    assert len({p.question for p in made}) == 40


@pytest.mark.parametrize(
    ("response", "reward"),
    [("7=15", 1.0), ("15", 1.0), ("15\n", 1.0), ("7=14", 0.0), ("", 0.0), ("15=", 0.0), ("150", 0.0), ("7=15 ok", 0.0)],
)
def test_the_last_total_is_the_answer(response, reward):
    sums = task(kind="digit_sums", lengths=[3])
    problem = next(p for p in problems(kind="digit_sums", lengths=[3], size=500) if p.answer == "15")
    assert sums.score(problem, response) == reward


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "digit_sums", "lengths": [3, 4], "size": 30},
        {"kind": "reasoning_gym", "dataset": "chain_sum", "size": 30},
        {"kind": "reasoning_gym", "dataset": "gsm_symbolic", "size": 30},
        {"kind": "reasoning_gym", "dataset": "knights_knaves", "size": 10},
    ],
)
def test_generated_problems_depend_on_the_seed_alone_and_solutions_are_right(config):
    made = problems(**config, seed=1)
    assert made == problems(**config, seed=1)
    assert not {p.question for p in made} & {p.question for p in problems(**config, seed=2)}
    assert len({p.id for p in made}) == len({p.question for p in made}) == len(made)
    copy = pickle.loads(pickle.dumps(task(**config)))
    assert {copy.score(problem, problem.solution) for problem in made} == {1.0}


def test_neighbouring_seeds_share_no_problems_although_the_sets_add_the_index_to_the_seed():
    first = problems(kind="reasoning_gym", dataset="chain_sum", size=200, seed=0, parameters={"min_digits": 4})
    second = problems(kind="reasoning_gym", dataset="chain_sum", size=200, seed=1, parameters={"min_digits": 4})
    assert not {p.question for p in first} & {p.question for p in second}
    assert len({derived_seed("chain_sum", seed, 0) for seed in range(100)}) == 100


def test_only_full_scores_are_rewards_unless_asked_otherwise():
    config = {"kind": "reasoning_gym", "dataset": "chain_sum", "size": 200}
    problem = next(p for p in problems(**config) if p.answer == "6")
    assert task(**config).score(problem, r"\boxed{6.0}") == 1.0
    assert task(**config).score(problem, r"\boxed{16}") == 0.0
    assert task(**config, binary=False).score(problem, r"\boxed{16}") == 0.5
    assert task(**config).score(problem, "6") == 0.0
    assert task(**config, answer_format="lenient").score(problem, "6") == 1.0


def test_chain_sum_solutions_show_every_step():
    for problem in problems(kind="reasoning_gym", dataset="chain_sum", size=50, level_key="num_terms"):
        *steps, answer = problem.solution.splitlines()
        assert len(steps) == int(problem.level) - 1
        assert all(eval(step.replace("=", "==")) for step in steps)
        assert answer == rf"\boxed{{{problem.answer}}}"


@pytest.mark.parametrize(
    "written",
    [
        "{}",
        "${}$",
        r"\({}\)",
        r"\text{{{}}}",
        "**{}**",
        r"\mathbf{{{}}}",
        "{}.",
        "x = {}",
        "$x = {}$",
        r"\text{{${}$}}",
    ],
)
def test_scorers_that_compare_texts_read_what_stands_around_a_number(written):
    sums = task(kind="reasoning_gym", dataset="chain_sum", size=2)
    for problem in sums.problems(LoadReport()):
        wrong = str(int(problem.answer) + 1)
        for answer, reward in ((problem.answer, 1.0), (wrong, 0.0)):
            assert sums.score(problem, rf"\boxed{{{written.format(answer)}}}") == reward


def test_gsm_symbolic_solutions_hold_true_equations_only():
    made = problems(kind="reasoning_gym", dataset="gsm_symbolic", size=300)
    equations = [
        line for p in made for line in p.solution.splitlines() if re.fullmatch(r"[-+*/\d., ]+= [-\d.,]+", line)
    ]
    assert len(equations) > 600
    for equation in equations:
        left, right = equation.replace(",", "").split("=")
        assert eval(left) == pytest.approx(float(right))
    assert sorted(len(p.solution) for p in made)[150] < 80


def test_gsm_symbolic_keeps_the_text_where_equations_do_not_lead_to_the_answer():
    entry = {"answer": "5", "metadata": {"answer_cot": "Half of ten, 2 + 2 = 5 apples.\n#### 5"}}
    assert gsm_symbolic(entry) == "Half of ten, 2 + 2 = 5 apples.\n\\boxed{5}"
    assert gsm_symbolic({"answer": "5", "metadata": {}}) is None


def test_knights_tell_the_truth_and_knaves_do_not():
    for problem in problems(kind="reasoning_gym", dataset="knights_knaves", size=40, parameters={"n_people": 4}):
        *lines, answer = problem.solution.splitlines()
        roles = problem.metadata["solution"]
        assert [line.endswith("is true.") for line in lines] == list(roles)
        assert answer.startswith("\\boxed{")


def test_sets_without_a_builder_have_no_solutions():
    made = problems(kind="reasoning_gym", dataset="basic_arithmetic", size=5)
    assert {p.solution for p in made} == {None}
    assert "basic_arithmetic" not in SOLUTION_BUILDERS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dataset": "chainsum"}, "reasoning-gym has no set 'chainsum'; did you mean chain_sum"),
        ({"dataset": "chain_sum", "parameters": {"terms": 3}}, "refuses the parameters {'terms': 3}"),
        ({"dataset": "chain_sum", "parameters": {"min_terms": 0}}, "min_terms must be positive"),
        (
            {"dataset": "chain_sum", "size": 300, "parameters": {"min_terms": 2, "max_terms": 2, "max_digits": 1}},
            r"gives only \d+ different problems .*, 300 were asked for; lower size",
        ),
    ],
)
def test_wrong_sets_are_refused(config, message):
    with pytest.raises(DataError, match=message.replace("{'", r"\{'").replace("3}", r"3\}")):
        problems(kind="reasoning_gym", **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "digit_sums", "lengths": [1]}, "a sum needs 2 digits"),
        ({"kind": "digit_sums", "lengths": [2], "size": 101}, "too few different sums of 2 digits"),
    ],
)
def test_impossible_digit_sums_are_refused(config, message):
    with pytest.raises(DataError, match=message):
        problems(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "excel", "path": "x"}, "does not match any of the expected tags"),
        ({"kind": "jsonl"}, "Field required"),
        ({"kind": "jsonl", "path": "x", "scorer": "latex"}, "'math' or 'exact'"),
        ({"kind": "jsonl", "path": "x", "answer_pattern": "("}, "not a regular expression"),
        ({"kind": "jsonl", "path": "x", "answer_pattern": "#### .*"}, "needs a group"),
        ({"kind": "digit_sums", "lengths": [3], "weight": 0}, "greater than 0"),
        ({"kind": "digit_sums", "lengths": [3], "sizes": 4}, "Extra inputs"),
        ({"kind": "digit_sums", "lengths": []}, "at least 1 item"),
    ],
)
def test_wrong_configurations_are_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        task(**config)

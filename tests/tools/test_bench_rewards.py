"""The measurement of the judge: its parts are right, and on golds that it makes up the judge makes no error."""

from __future__ import annotations

import json
import re
import sys
from random import Random

import bench_rewards
import pytest
from _answer_values import surely_different, value_of
from _made_golds import KINDS, made_golds
from _perturbations import CERTAIN, PERTURBATIONS, perturbations
from _published_rewards import quietly, trl, verl
from _respellings import RESPELLINGS, respellings


@pytest.mark.parametrize(
    ("a", "b", "different"),
    [
        (r"\frac{1}{2}", "0.5", False),
        (r"\frac{1}{2}", r"\frac{1}{3}", True),
        ("0.333333", r"\frac{1}{3}", False),
        ("10^{30}", "10^{30} + 1", True),
        (r"2\sqrt{3}", r"\sqrt{12}", False),
        (r"3\frac{1}{2}", r"\frac{7}{2}", False),
        ("2ab", "2ba", False),
        ("2ab", "2ac", True),
        (r"\{1, 2\}", "2, 1", False),
        (r"\{1, 2\}", r"\{1, 3\}", True),
        ("(1, 2)", "(2, 1)", True),
        ("(1, 2]", "[1, 2]", True),
        (r"50\%", "0.5", False),
        (r"50\%", "50", False),
        (r"50\%", "5", True),
        ("y = 2x + 3", "2x + 3 = y", False),
        ("y = 2x + 3", "y = 3x + 3", True),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \end{pmatrix}", True),
        ("1", "not read @", False),
    ],
)
def test_values_are_compared_by_arithmetic_of_the_tools_own(a, b, different):
    assert surely_different(value_of(a), value_of(b)) is different


def test_golds_are_the_same_for_a_seed_and_of_every_kind():
    golds = made_golds(100, 3)
    assert golds == made_golds(100, 3) != made_golds(100, 4)
    assert {gold.kind for gold in golds} == set(KINDS)
    assert len({gold.text for gold in golds}) == 100


def test_every_kind_of_spelling_and_of_wrong_answer_is_made():
    rng, same, other = Random(0), set(), set()
    for gold in made_golds(200, 0):
        same |= set(respellings(gold.text))
        other |= set(perturbations(gold.text, rng)[0])
    assert same == set(RESPELLINGS) and len(same) >= 20
    assert set(PERTURBATIONS) - other == set()


def test_other_spellings_of_numbers_have_their_value():
    for gold in made_golds(200, 1):
        value = value_of(gold.text)
        for spellings in respellings(gold.text).values():
            assert not any(surely_different(value, value_of(spelling)) for spelling in spellings), (gold, spellings)


def test_wrong_answers_have_another_value():
    rng, certain = Random(2), {function.__name__[1:] for function in CERTAIN}
    for gold in made_golds(100, 2):
        for kind, answer in perturbations(gold.text, rng)[0].items():
            assert answer != gold.text
            assert kind in certain or surely_different(value_of(gold.text), value_of(answer))


def test_the_judge_makes_no_error_on_golds_that_are_made_up(monkeypatch, capsys, tmp_path):
    report = _report(monkeypatch, capsys, "--made", "60", "--per-gold", "3", "--seed", "5")["sets"]["made up"]
    assert report["golds"] == 60 and report["refused"] == 0
    assert report["other_spellings"]["pairs"] > 120 < report["wrong_answers"]["pairs"]
    for part in ("itself", "other_spellings", "wrong_answers"):
        assert report[part]["ours"] == {"wrong": 0, "per_10000": 0.0}
    assert report["other_spellings"]["math_verify"]["wrong"] > 0


def test_a_wrong_judge_is_found(monkeypatch, capsys):
    judges = {"ours": lambda gold, answer: True, "math_verify": lambda gold, answer: None}
    monkeypatch.setattr(bench_rewards, "JUDGES_HERE", judges)
    report = _report(monkeypatch, capsys, "--made", "40")["sets"]["made up"]
    assert report["wrong_answers"]["ours"]["per_10000"] == 10_000 and report["other_spellings"]["ours"]["wrong"] == 0
    assert report["itself"]["math_verify"] == {"wrong": 0, "per_10000": 0.0, "no_verdict": 40}


def test_golds_are_read_from_files_by_name(monkeypatch, capsys, tmp_path):
    rows = [{"answer": answer} for answer in ("5", "5", "7 @ 5", r"\frac{1}{2}")]
    rows[0]["problem"] = "one\N{LINE SEPARATOR}row"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    golds = ("--made", "0", "--golds", f"A set={tmp_path / 'rows.jsonl'}", "--per-gold", "1")
    ((name, report),) = _report(monkeypatch, capsys, *golds)["sets"].items()
    assert (name, report["golds"], report["refused"]) == ("A set", 3, 1)


def test_a_report_keeps_the_other_sets_of_the_same_seed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_rewards, "JUDGES_HERE", {"ours": lambda gold, answer: gold == answer})
    (tmp_path / "rows.jsonl").write_text('{"answer": "5"}\n')
    file = ("--json", str(tmp_path / "report.json"))
    _report(monkeypatch, capsys, "--made", "3", *file)
    rows = ("--made", "0", "--golds", f"A set={tmp_path / 'rows.jsonl'}", *file)
    assert set(_report(monkeypatch, capsys, *rows)["sets"]) == {"made up", "A set"}
    assert set(_report(monkeypatch, capsys, *rows, "--seed", "1")["sets"]) == {"A set"}


def test_a_verdict_ends_with_its_limit():
    def endless(gold: str, answer: str) -> bool:
        while True:
            try:
                while True:
                    pass
            except Exception:
                continue

    assert bench_rewards._verdict(endless, "1", "1", 0.05) is None


def test_functions_of_others_are_run_from_a_copy_of_their_repositories(tmp_path):
    files = {
        "verl/utils/reward_score/math_reward.py": "def compute_score(s, g): return float(g in s)",
        "verl/utils/reward_score/math_dapo.py": "def compute_score(s, g): return {'acc': s == f'Answer: {g}'}",
        "trl/rewards/accuracy_rewards.py": "from ..helper import FOUND\ndef accuracy_reward(c, s): return [FOUND]",
        "trl/helper.py": "FOUND = None",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = set(sys.modules)
    try:
        judges = {**verl(tmp_path), **trl(tmp_path)}
        assert {name: quietly(judge, "5", "5") for name, judge in judges.items()} == {
            "verl, MATH": True,
            "verl, DAPO": True,
            "TRL": None,
        }
    finally:
        for name in set(sys.modules) - before:
            if re.match(r"(?:verl|trl)(?:\.|$)", name):
                del sys.modules[name]


def _report(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_rewards.py", *arguments])
    bench_rewards.main()
    return json.loads(capsys.readouterr().out)

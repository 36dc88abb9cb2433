"""Gold answers are checked once, in bulk, and remembered."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from megatron_hdpo.rewards import gold
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.gold import JUDGES, GoldCache, GoldVerdict, check_golds, rules_digest
from megatron_hdpo.rewards.pool import RewardPool


class Checker:
    """Counts what it is asked; `bad` answers cannot be parsed, `slow` ones come to no end."""

    def __init__(self):
        self.asked = []

    def __call__(self, answers):
        self.asked += answers
        verdicts = {"bad": GoldVerdict("no expression"), "slow": GoldVerdict("no result in time", certain=False)}
        return [verdicts.get(answer, GoldVerdict(None)) for answer in answers]


def test_plain_numbers_need_no_parser_and_answers_are_asked_once():
    checker = Checker()
    verdicts = check_golds(["1", "-2.5", "x", "x", "bad"], checker)
    assert checker.asked == ["x", "bad"]
    assert {answer for answer, verdict in verdicts.items() if verdict.error} == {"bad"}


def test_verdicts_are_remembered_unless_time_ran_out(tmp_path):
    first, second = Checker(), Checker()
    for checker in (first, second):
        verdicts = check_golds(["x", "bad", "slow"], checker, GoldCache(tmp_path / "cache"))
        assert verdicts["bad"].error == "no expression" and verdicts["x"].error is None
    assert first.asked == ["x", "bad", "slow"]
    assert second.asked == ["slow"]


def test_a_cache_that_cannot_be_used_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert check_golds(["bad"], Checker(), GoldCache(tmp_path / "file"))["bad"].error == "no expression"
    assert "cannot read the cache" in caplog.text


@pytest.mark.parametrize("package", JUDGES)
def test_the_cache_belongs_to_the_version_of_every_judge(tmp_path, monkeypatch, package):
    asked = []
    for changed in (None, package):
        monkeypatch.setattr(gold, "version", lambda name, changed=changed: "new" if name == changed else "1")
        rules_digest.cache_clear()
        checker = Checker()
        check_golds(["x"], checker, GoldCache(tmp_path))
        asked.append(checker.asked)
    rules_digest.cache_clear()
    assert asked == [["x"], ["x"]]


def test_the_cache_belongs_to_every_rule(tmp_path, monkeypatch):
    room = tmp_path / "rewards"
    shutil.copytree(Path(gold.__file__).parent, room)
    monkeypatch.setattr(gold, "__file__", str(room / "gold.py"))
    digests = set()
    rules = sorted(room.glob("*.py"))
    for rule in (None, *rules):
        if rule is not None:
            rule.write_text(rule.read_text() + "# changed\n")
        rules_digest.cache_clear()
        digests.add(rules_digest())
    rules_digest.cache_clear()
    assert len(digests) == len(rules) + 1


def test_an_endless_answer_is_an_error_of_the_data():
    checker = Checker()
    assert "5000 characters" in check_golds(["x" * 5000], checker)["x" * 5000].error
    assert checker.asked == []


def test_workers_parse_gold_and_only_they_are_certain():
    with RewardPool([], RewardConfig(workers=1, time_limit_s=1, max_retries=0)) as pool:
        verdicts = pool.check_golds([r"\frac{1}{2}", "a + b +", "x^2"])
    assert [verdict.error is None for verdict in verdicts] == [True, False, True]
    assert "not an expression" in verdicts[1].error and verdicts[1].certain
    assert pool.check_golds(["x^3"]) == [GoldVerdict("the workers are closed", certain=False)]

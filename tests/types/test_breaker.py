"""When a server is taken out of rotation, and when it is tried again."""

from __future__ import annotations

from megatron_hdpo.types.breaker import FAILURES, FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    assert [breaker.fail(f"sample {i}", "status 500") for i in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    return breaker


def test_it_opens_when_different_samples_fail_in_a_row() -> None:
    breaker = opened(Clock())
    assert breaker.state == "open" and breaker.reason == "status 500"
    assert not breaker.fail("late", "status 500"), "it is said once"


def test_one_sample_that_nobody_can_serve_does_not_open_it() -> None:
    breaker = Breaker(Clock())
    assert not any(breaker.fail("poison", "status 500") for _ in range(10 * FAILURES))
    assert breaker.state == "closed"


def test_a_success_between_failures_keeps_it_closed() -> None:
    breaker = Breaker(Clock())
    for i in range(10 * FAILURES):
        assert not breaker.fail(f"sample {i}", "status 500")
        assert not breaker.succeed()
    assert breaker.state == "closed"


def test_the_pause_doubles_until_a_sample_succeeds() -> None:
    clock = Clock()
    breaker, pause = opened(clock), FIRST_PAUSE_S
    for _ in range(10):
        clock.now += 0.9 * pause
        assert not breaker.due
        clock.now += 0.2 * pause
        assert breaker.due
        breaker.stay_open()
        pause = min(2 * pause, LONGEST_PAUSE_S)
    assert pause == LONGEST_PAUSE_S
    assert breaker.succeed() and breaker.state == "closed" and not breaker.due
    assert [breaker.fail(f"again {i}", "") for i in range(FAILURES)][-1]
    clock.now += 1.1 * FIRST_PAUSE_S
    assert breaker.due, "the pause is short again"


def test_a_failure_on_trial_opens_it_again_without_a_word() -> None:
    clock = Clock()
    breaker = opened(clock)
    breaker.state = "half_open"
    assert not breaker.fail("the first after the trial", "status 500") and breaker.state == "open"
    clock.now += 1.1 * FIRST_PAUSE_S
    assert not breaker.due, "after a longer pause"

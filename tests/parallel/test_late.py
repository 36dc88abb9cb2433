"""Who is late, from what ranks say of themselves: the one that stands still and waits for nobody."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_hdpo.parallel.late import COLLECTIVE, LOOK_S, MEETING, Beat, Patience, verdict

PATIENCE = Patience(work_s=3600.0, process_s=600.0, collective_s=600.0, phases={"save": 7200.0})
STILL_S = 700.0


def beats_of(*changes: dict[str, object]) -> list[Beat]:
    """Of ranks that train and have stood still for longer than a collective's deadline, but for the changes."""
    still = Beat("node0", phase="train", doing="step 3, train 4/9 tokens", at="policy.py:7 in update", still_s=STILL_S)
    return [replace(still, **change) for change in changes]  # type: ignore[arg-type]


def judged(beats: list[Beat], silent: dict[int, float] | None = None) -> str:
    return verdict(beats, [(silent or {}).get(rank, 0.0) for rank in range(len(beats))], PATIENCE)


IN_COLLECTIVE = {"waits": COLLECTIVE}


def test_a_rank_that_works_without_progress_is_named_with_phase_step_place_and_key() -> None:
    text = judged(beats_of(IN_COLLECTIVE, {"host": "node1"}, IN_COLLECTIVE))
    assert text == (
        "rank 1 on node1 has made no progress for 12 min while rank 0 on node0 waited for it in 'train' (raise "
        "parallel.timeout_minutes if its work may take longer without any); the last that it said: step 3, train 4/9 "
        "tokens, at policy.py:7 in update; see logs/rank_00001.log in the run folder"
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([IN_COLLECTIVE, {"still_s": 5.0}], id="slow, but it progresses"),
        pytest.param([{**IN_COLLECTIVE, "still_s": 5.0}, {}], id="nobody has waited for long"),
        pytest.param([{}, {}], id="nobody waits: all work in silence"),
        pytest.param([{"waits": MEETING, "arrived": 4}, {"arrived": 3}], id="work before a meeting may take an hour"),
        pytest.param([{"waits": MEETING, "arrived": 4}, {"arrived": 4}], id="it has arrived at that meeting"),
        pytest.param([IN_COLLECTIVE, {"phase": "save"}], id="this phase has two hours"),
        pytest.param([IN_COLLECTIVE, {"left": True}], id="it has ended in peace"),
        pytest.param([IN_COLLECTIVE, IN_COLLECTIVE], id="in collectives, for less than the longest deadline"),
    ],
)
def test_a_rank_that_may_still_come_is_not_blamed(changes: list[dict[str, object]]) -> None:
    assert judged(beats_of(*changes)) == ""


def test_a_meeting_and_a_phase_have_deadlines_of_their_own() -> None:
    before_meeting = {"arrived": 3, "still_s": 3700.0}
    text = judged(beats_of({"waits": MEETING, "arrived": 4, "still_s": 3700.0}, before_meeting))
    assert "rank 1 on node0 has made no progress for 62 min" in text and "(raise parallel.silence_minutes " in text
    text = judged(beats_of({**IN_COLLECTIVE, "still_s": 7300.0}, {"phase": "save", "still_s": 7300.0}))
    assert "rank 1 on" in text and "(raise parallel.phase_minutes.save " in text


def test_all_that_stand_still_are_named_with_the_first() -> None:
    text = judged(beats_of(IN_COLLECTIVE, {}, {"still_s": 550.0}, {"still_s": 5.0}, {}, {}))
    assert all(f"rank {rank} on node0 has made no progress" in text for rank in (1, 2, 4))
    assert text.endswith(", and 1 more ranks") and "rank 3 on" not in text and "\n" not in text


def test_a_rank_without_beats_is_named_before_all_others() -> None:
    text = judged(beats_of(IN_COLLECTIVE, IN_COLLECTIVE, {}), {1: 601.0})
    assert text.startswith("rank 1 on node0 has given no sign of life for 10 min (parallel.timeout_minutes); the last")
    assert "rank 2 on" not in text and text.endswith(
        "; rank 0 is at: step 3, train 4/9 tokens, at policy.py:7 in update"
    )
    assert judged(beats_of(IN_COLLECTIVE, {"still_s": 0.0}), {1: 599.0}) == ""


def test_where_no_stack_shows_who_waits_the_number_of_collectives_does() -> None:
    """On NCCL: ranks 0 and 2 have called a collective of group "dp" that rank 1 has not; rank 3 is in another group."""
    calls = [{"collectives": {"dp": n}} for n in (8, 7, 8)]
    text = judged(beats_of(*calls, {"collectives": {"tp": 3}, "still_s": 0.0}))
    assert text.startswith("rank 1 on node0 has made no progress") and "while rank 0 on node0 waited for it" in text
    assert "rank 2 on" not in text
    assert judged(beats_of(calls[0], calls[2])) == "", "nobody has called more than the others"


def test_ranks_in_different_collectives_wait_for_each_other() -> None:
    waits = {**IN_COLLECTIVE, "still_s": 3700.0}
    text = judged(beats_of({**waits, "collectives": {"0": 8}}, {**waits, "collectives": {"0": 7}}))
    assert text.startswith("all ranks wait for each other, without progress for 62 min: rank 1 on node0 (step 3, train")
    assert text.endswith("called fewer collectives than others") and "rank 0" not in text


def test_a_thousand_ranks_look_less_often_and_a_short_deadline_has_many_looks() -> None:
    default = Patience(3600.0, 600.0)
    assert default.look_s(8) == LOOK_S
    assert default.look_s(1024) == 64.0
    hurried = Patience(3.0, 60.0)
    assert hurried.beat_s * 20 <= 3.0 and hurried.look_s(4) * 10 <= 3.0


def test_a_collective_fails_by_itself_only_after_every_verdict() -> None:
    assert PATIENCE.last_resort_s > 7200.0 + PATIENCE.look_s(8) + 2 * PATIENCE.beat_s

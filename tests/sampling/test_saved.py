"""Saved rollouts: exact round trip, readable text, and a clear report of what cannot be read or written."""

import gzip
import json
import logging
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from megatron_hdpo.sampling.saved import all_files, read_groups, read_share, step_file, step_files, write_groups
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample, TopKArrays


def decode(ids: np.ndarray) -> str:
    return " ".join(f"<{i}>" for i in ids)


def write(path: Path, groups: list[Group]) -> None:
    write_groups(path, dict(enumerate(groups)), len(groups), decode)


def text_of(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


def write_text(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()))


def any_bits(shape):
    """float32 of every bit pattern: subnormal, infinite, NaN with its payload."""
    return arrays.arrays(np.uint32, shape).map(lambda bits: bits.view(np.float32))


@st.composite
def samples(draw) -> Sample:
    length, k = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    ids = st.integers(0, 2**31 - 1)
    tops = TopKArrays(draw(arrays.arrays(np.int32, (length, k), elements=ids)), draw(any_bits((length, k))))
    completion = Completion(
        token_ids=draw(arrays.arrays(np.int32, length, elements=ids)),
        logprobs=draw(any_bits(length)),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        weight_versions=draw(arrays.arrays(np.int32, length, elements=st.integers(-1, 9))),
        top_logprobs=tops if k else None,
        routed_experts=draw(st.none() | arrays.arrays(np.uint16, (length + 1, 2, 2))),
    )
    feedback = draw(st.none() | st.text(max_size=20))
    numbers = st.floats(allow_nan=False, allow_infinity=False)
    components = draw(st.dictionaries(st.sampled_from(["task", "judge", "brevity"]), numbers))
    decided_by = draw(st.sampled_from(["", *components]))
    return Sample(completion, draw(st.text(max_size=20)), draw(numbers), feedback, components, decided_by)


@st.composite
def groups(draw) -> Group:
    optional = st.none() | st.text(max_size=8)
    problem = Problem(*[draw(st.text(max_size=12)) for _ in range(4)], draw(optional), draw(optional))
    ids = arrays.arrays(np.int32, st.integers(1, 6), elements=st.integers(0, 10**6))
    return Group(
        problem=problem,
        prompt_ids=draw(ids),
        samples=draw(st.lists(samples(), max_size=3)),
        privileged_prompt_ids=draw(st.none() | ids),
        privileged_samples=draw(st.lists(samples(), max_size=2)),
        dropped=draw(st.dictionaries(st.sampled_from(["leaked", "duplicate", "wrong"]), st.integers(0, 9))),
    )


def assert_same_array(left: np.ndarray | None, right: np.ndarray | None) -> None:
    if left is None or right is None:
        assert left is right
        return
    assert left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    assert left.flags.writeable


def assert_same_sample(left: Sample, right: Sample) -> None:
    names = ("text", "reward", "feedback", "components", "decided_by", "correctness", "finish_reason")
    assert [getattr(left, name) for name in names] == [getattr(right, name) for name in names]
    mine, its = left.completion, right.completion
    for name in ("token_ids", "logprobs", "weight_versions", "routed_experts"):
        assert_same_array(getattr(mine, name), getattr(its, name))
    assert (mine.top_logprobs is None) == (its.top_logprobs is None)
    if mine.top_logprobs and its.top_logprobs:
        assert_same_array(mine.top_logprobs.ids_TK, its.top_logprobs.ids_TK)
        assert_same_array(mine.top_logprobs.logprobs_TK, its.top_logprobs.logprobs_TK)


def assert_same_group(left: Group, right: Group) -> None:
    assert (left.problem, left.dropped) == (right.problem, right.dropped)
    assert_same_array(left.prompt_ids, right.prompt_ids)
    assert_same_array(left.privileged_prompt_ids, right.privileged_prompt_ids)
    for mine, its in ((left.samples, right.samples), (left.privileged_samples, right.privileged_samples)):
        for a, b in zip(mine, its, strict=True):
            assert_same_sample(a, b)


@given(written=st.lists(groups(), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_round_trip_is_exact_to_the_bit(written, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "rollouts.jsonl.gz"
    write(path, written)
    read = read_groups(path)
    for left, right in zip(read, written, strict=True):
        assert_same_group(left, right)


def example_group(**problem) -> Group:
    completion = Completion(
        token_ids=np.array([5, 6, 2], np.int32),
        logprobs=np.array([-0.1, -0.2, -0.3], np.float32),
        finish_reason="stop",
        weight_versions=np.array([3, 3, 3], np.int32),
    )
    fields = {
        "id": "sums/1",
        "task": "sums",
        "question": "What is 3 \u00d7 4?",
        "answer": "12",
        "level": "easy",
        **problem,
    }
    return Group(
        problem=Problem(**fields),
        prompt_ids=np.array([1, 9], np.int32),
        samples=[Sample(completion, "It is\n12", 1.0), Sample(completion, "13", 0.0)],
        privileged_prompt_ids=np.array([1, 9, 12], np.int32),
        privileged_samples=[Sample(completion, "12", 1.0)],
        dropped={"leaked": 2},
    )


def test_a_person_finds_texts_and_rewards_before_any_array(tmp_path):
    path = tmp_path / "new" / "folder" / "rollouts.jsonl.gz"
    write(path, [example_group()])
    text = text_of(path)
    assert text.count("\n") == 1 and text.endswith("\n")
    assert "What is 3 \u00d7 4?" in text and text.index('"privileged": [{') < text.index("base64")
    record = json.loads(text)
    assert (record["level"], record["dropped"], record["prompt"]) == ("easy", {"leaked": 2}, "<1> <9>")
    assert record["privileged_prompt"] == "<1> <9> <12>"
    assert record["samples"] == [
        {"reward": 1.0, "finish_reason": "stop", "tokens": 3, "text": "It is\n12"},
        {"reward": 0.0, "finish_reason": "stop", "tokens": 3, "text": "13"},
    ]
    assert list(record)[-1] == "replay"


def test_metadata_that_json_cannot_hold_is_left_out_by_name(tmp_path):
    metadata = {"seed": 3, "parts": ["a", 1.5], "exact": Fraction(1, 3), "pair": (1, 2), "nan": float("nan")}
    path = tmp_path / "log.gz"
    write(path, [example_group(metadata=metadata)])
    (group,) = read_groups(path)
    assert group.problem.metadata == {"seed": 3, "parts": ["a", 1.5]}
    assert json.loads(text_of(path))["metadata_left_out"] == ["exact", "pair", "nan"]


def test_a_reward_that_is_no_number_is_refused_and_the_file_stays(tmp_path):
    path = tmp_path / "log.gz"
    write(path, [example_group()])
    before = path.read_bytes()
    bad = example_group(id="sums/2")
    bad.samples[1].reward = float("nan")
    with pytest.raises(ValueError, match="sums/2: reward nan"):
        write(path, [example_group(), bad])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_of_an_older_run_is_read_and_its_cut_off_last_line_is_named(tmp_path, caplog):
    """Older runs append to one file per step, not compressed, whose lines do not say which group they are."""
    written = [example_group(id=f"sums/{i}") for i in range(3)]
    write(tmp_path / "new.gz", written)
    old = [json.loads(line) for line in text_of(tmp_path / "new.gz").splitlines()]
    path = tmp_path / "step_00000007.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k not in ("group", "of")}) + "\n" for r in old))
    assert step_files(tmp_path, 7) == [path]
    assert [sorted(read_share([path], rank, 2)) for rank in (0, 1)] == [[0, 2], [1]]
    assert_same_group(read_share([path], 1, 2)[1], written[1])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"jsonl:3: broken line, the file ends here"):
        read_groups(path)
    with caplog.at_level(logging.WARNING):
        assert [g.problem.id for g in read_groups(path, skip_broken=True)] == ["sums/0", "sums/1"]
    assert "jsonl:3" in caplog.text


def saved_by_ranks(folder: Path, of: int = 7) -> list[Group]:
    """Seven groups of step 4, of which rank r of three has sampled every third."""
    groups = [example_group(id=f"sums/{i}") for i in range(7)]
    for rank in range(3):
        own = {i: group for i, group in enumerate(groups) if i % 3 == rank}
        write_groups(folder / step_file(4, rank), own, of, decode)
    return groups


@pytest.mark.parametrize("ranks", [1, 2, 5, 9])
def test_any_number_of_ranks_reads_what_others_wrote(tmp_path, ranks):
    groups = saved_by_ranks(tmp_path)
    shares = [read_share(step_files(tmp_path, 4), rank, ranks) for rank in range(ranks)]
    assert sum(map(len, shares)) == 7 and max(map(len, shares)) <= -(-7 // ranks)
    for index, group in (item for share in shares for item in share.items()):
        assert_same_group(group, groups[index])


def test_a_missing_file_of_a_rank_is_said(tmp_path):
    saved_by_ranks(tmp_path)
    (tmp_path / step_file(4, 1)).unlink()
    with pytest.raises(ValueError, match="step 4 has 7 groups, but its files 5: the file of a rank is missing"):
        read_share(step_files(tmp_path, 4), 0, 1)


def test_a_compressed_file_that_was_cut_is_said(tmp_path):
    path = tmp_path / step_file(1, 0)
    write(path, [example_group()])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="ends too early"):
        read_groups(path)


def test_files_come_by_step_and_rank_and_others_are_left_alone(tmp_path):
    names = ["step_00000002.jsonl", step_file(1, 0), step_file(1, 1), "step_00000001.rank_00000.jsonl.gz.partial", "x"]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in all_files(tmp_path)] == [names[1], names[2], names[0]]
    assert all_files(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("format"), "format 1"),
        (lambda r: r.pop("question"), "key 'question' is missing"),
        (lambda r: r["replay"].pop("samples"), "key 'samples' is missing"),
        (lambda r: r["samples"].pop(), "1 samples but arrays for 2"),
        (lambda r: r["samples"][0].update(finish_reason="abort"), "finish_reason 'abort'"),
        (lambda r: r["samples"][0].update(reward=None), "wrong type"),
        (lambda r: r["replay"]["samples"][1]["logprobs"].update(shape=[2], base64="AAAAAAAAAAA="), "different lengths"),
        (lambda r: r["replay"]["prompt_ids"].update(base64="!"), "log.gz:2"),
        (lambda r: r["replay"]["prompt_ids"].update(shape=[7]), "log.gz:2"),
    ],
)
def test_a_damaged_record_is_named_by_line_and_reason(tmp_path, change, message):
    path = tmp_path / "log.gz"
    write(path, [example_group(), example_group()])
    first, second = text_of(path).splitlines()
    record = json.loads(second)
    change(record)
    write_text(path, first + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_groups(path)
    assert "log.gz:2" in str(caught.value)

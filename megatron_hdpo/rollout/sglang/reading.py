"""From the bytes of an answer to a sampling request to arrays. Imports no torch: it runs in the parsers' processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_hdpo.rewards.worker import Outcome, guarded
from megatron_hdpo.rollout.sglang.answers import Asked, BadAnswerError, NoCompletionError, decoded, parse_completion
from megatron_hdpo.rollout.sglang.partial import read_beginning
from megatron_hdpo.rollout.sglang.streamed import Answer, StreamedAnswer
from megatron_hdpo.types.rollouts import Completion

Ending = Literal["complete", "false", "aborted", "cut", "error", "unread"]


@dataclass
class RawAnswer:
    """Bytes of an answer so far.

    streamed: it is a stream of events, each with the tokens since the one before; else it is one JSON object. ended:
    the server has ended it; while False, the rest is missing.
    """

    streamed: bool
    pieces: list[bytes] = field(default_factory=list)
    size: int = 0
    ended: bool = False

    def add(self, piece: bytes) -> None:
        """Add the bytes that follow."""
        self.pieces.append(piece)
        self.size += len(piece)


@dataclass(frozen=True)
class Reading:
    """What an answer holds.

    ending: `complete`; `false`: it claims to be complete, and fails a check; `aborted` by the server; `cut` off;
    `error`: it is no completion; `unread`: no process could read it. completion: the response of a complete answer, the
    tokens so far of one that ended early; None without any that can be trusted. tokens: number of tokens that have come
    of a response that ended early or is false. problem: why it is not complete. status: the HTTP status of an error,
    None when the server has said nothing. counts: what the server says of the tokens of the prompt.
    """

    ending: Ending
    completion: Completion | None = None
    tokens: int = 0
    problem: str = ""
    status: int | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)


def read_in_worker(answer: RawAnswer, asked: Asked) -> Outcome:
    """Return an Outcome with the Reading of an answer, in a process of `Parsers`."""
    return guarded(lambda: read_answer(answer, asked))


def read_answer(answer: RawAnswer, asked: Asked) -> Reading:
    """Return what an answer holds, checked against the request; never raises for what a server may send."""
    if not (answer.ended or answer.streamed):
        return Reading("cut")
    body, arrived = b"".join(answer.pieces), StreamedAnswer()
    try:
        whole = _assembled(body, arrived) if answer.streamed else decoded(body)
        if not answer.ended:
            return _early("cut", arrived.so_far(), asked)
        if whole is None:
            raise NoCompletionError("the answer ended early", None)
        return _checked(whole, arrived, answer.streamed, asked)
    except NoCompletionError as error:
        return _early("error" if answer.ended else "cut", arrived.so_far(), asked, str(error), error.status)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        problem = f"an answer that cannot be read: {type(error).__name__}: {error}"
        return Reading("false", tokens=_tokens(arrived.so_far()), problem=problem)


def _assembled(body: bytes, arrived: StreamedAnswer) -> Answer | None:
    """Return the answer that a stream makes up, None while its last piece is missing. arrived: gets the pieces."""
    for event in _events(body):
        whole = arrived.add(decoded(event))
        if whole is not None:
            return whole  # what follows is the mark of the stream's end
    return None


def _events(body: bytes) -> Iterator[bytes]:
    """Yield the data of each complete server-sent event."""
    *events, _ = body.split(b"\n\n")
    for event in events:
        yield event.removeprefix(b"data:").strip()


def _checked(whole: Answer, arrived: StreamedAnswer, streamed: bool, asked: Asked) -> Reading:
    meta = whole["meta_info"]
    finish = meta.get("finish_reason")
    if isinstance(finish, dict) and finish.get("type") == "abort":
        told = not streamed or "weight_versions" in meta
        return _early("aborted", whole if told else arrived.so_far(), asked, str(finish.get("message")))
    experts = asked.experts if asked.sampling.routed_experts else None
    try:
        completion = parse_completion(
            whole, asked.sampling, asked.vocab_size, asked.stamp, experts, asked.prompt_length
        )
    except BadAnswerError as error:
        return Reading("false", tokens=_tokens(whole), problem=str(error))
    return Reading("complete", completion, counts={name: meta.get(name) for name in ("prompt_tokens", "cached_tokens")})


def _early(ending: Ending, answer: Answer, asked: Asked, problem: str = "", status: int | None = None) -> Reading:
    return Reading(ending, read_beginning(answer, asked), _tokens(answer), problem, status)


def _tokens(answer: dict[str, Any]) -> int:
    return len(answer.get("output_ids") or [])

"""One try of a sample on one server: the request, its deadline, and what is kept when it ends early."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_hdpo.rollout.sglang.answers import Asked
from megatron_hdpo.rollout.sglang.api import ApiError
from megatron_hdpo.rollout.sglang.partial import as_finished, continuation, joined, shortened
from megatron_hdpo.rollout.sglang.reading import RawAnswer, Reading
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.stamps import problem_with_versions
from megatron_hdpo.types.loop_thread import to_its_end
from megatron_hdpo.types.rollouts import Completion, GenerationRequest

if TYPE_CHECKING:
    from megatron_hdpo.rollout.sglang.engine import SGLangEngine

ABORT_GRACE_S = 10.0
"""Longest wait for the tokens of a request that was aborted at its deadline."""


class TryError(Exception):
    """This try of a sample brought no completion; another one may.

    blame: `server` when the server failed, `sample` when its answer is complete but unwanted, None when nobody failed:
    the server was taken out, or the request was aborted.
    """

    def __init__(self, reason: str, blame: str | None = "server") -> None:
        super().__init__(reason)
        self.blame = blame


@dataclass
class OpenSample:
    """A sample that is not complete.

    beginning: its tokens so far, from requests that ended early. failed: indices of servers that failed it.
    """

    request: GenerationRequest
    index: int
    beginning: Completion | None = None
    failed: set[int] = field(default_factory=set)

    @property
    def key(self) -> str:
        """Name of the sample."""
        return f"{self.request.request_id}/{self.index}"

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return 0 if self.beginning is None else len(self.beginning.token_ids)


class Asking:
    """Asks the servers of an engine for samples. All methods run in the engine's loop."""

    def __init__(self, engine: SGLangEngine) -> None:
        self.engine = engine
        self.config = engine.config

    async def ask(self, replica: Replica, sample: OpenSample) -> Completion:
        """Return the completed sample.

        Raises TryError when this server does not complete it; the sample then holds what it has generated.
        """
        if replica.state != "serving":
            raise TryError(f"{replica.url} was lost: {replica.reason}", None)
        wanted = self.engine.weight_version
        request = self._remaining(replica, sample, wanted)
        answer = RawAnswer(streamed=self._streams(replica, request))
        rid = f"{sample.key}-{os.urandom(4).hex()}"
        failure: TryError | None = None
        try:
            with self.engine.usage.running():
                await self._receive(replica, sample, request, rid, answer)
        except asyncio.CancelledError:
            if self.engine.dropping:
                await to_its_end(self._take_in(sample, request, answer, wanted))
            raise
        except TryError as error:
            failure = error
        blame = None if self.engine.watch.paused else "server"
        reading = await to_its_end(self._take_in(sample, request, answer, wanted))
        if reading.ending == "complete":
            assert reading.completion is not None
            return await self._completed(replica, sample, reading.completion, wanted)
        finished = None if sample.beginning is None else as_finished(sample.beginning, sample.request)
        if finished is not None:
            return self._checked(replica, sample, finished)
        raise failure or await self._failure(replica, rid, reading, blame)

    async def stop_on_server(self, replica: Replica, rid: str) -> None:
        """Abort a request that is no longer needed on its server; behind a router, on all servers.

        A server that does not answer gets the abort when it returns.
        """

        async def abort(other: Replica) -> None:
            if other.state != "down":
                with suppress(ApiError):
                    return await other.api.abort(rid)
            other.abandoned.add(rid)

        with suppress(asyncio.CancelledError):
            await asyncio.shield(asyncio.gather(*map(abort, self._may_answer(replica)), return_exceptions=True))

    def _may_answer(self, replica: Replica) -> Sequence[Replica]:
        """Return the servers of which one samples a request to `replica`: behind a router, all."""
        return self.engine.replicas if self.config.router else [replica]

    def _remaining(self, replica: Replica, sample: OpenSample, version: int) -> GenerationRequest:
        """Return the request for the rest of a sample."""
        beginning, prompt = sample.beginning, len(sample.request.prompt_ids)
        if beginning is not None:
            if self.config.mixed_versions == "drop" and beginning.weight_versions.max() != version:
                beginning = None
            else:
                longest = min(other.info.max_prompt for other in self._may_answer(replica))
                beginning = shortened(beginning, longest - prompt, prompt)
            kept = 0 if beginning is None else len(beginning.token_ids)
            self.engine.counts.lost_tokens += sample.tokens - kept
            sample.beginning = beginning
        return sample.request if beginning is None else continuation(sample.request, beginning)

    def _streams(self, replica: Replica, request: GenerationRequest) -> bool:
        """Return whether to ask for the tokens while they are generated.

        Not with top log-probs: SGLang streams them as nested lists only, which are slow to read.
        """
        if not self.config.stream_interval or request.sampling.top_logprobs:
            return False
        return all(other.info.streams_increments for other in self._may_answer(replica))

    async def _receive(
        self, replica: Replica, sample: OpenSample, request: GenerationRequest, rid: str, answer: RawAnswer
    ) -> None:
        """Fill `answer` with the server's answer, perhaps an aborted one. Raises TryError when it does not end."""
        body = request_body(request, sample.index, self.engine.deterministic) | {"rid": rid}
        if answer.streamed:
            body["stream"] = True
            body["sampling_params"]["stream_interval"] = self.config.stream_interval
        limit = self.config.request_timeout_s
        inner = asyncio.create_task(replica.ask.receive(answer, body, limit + ABORT_GRACE_S))
        replica.in_flight.add(inner)
        try:
            await asyncio.wait({inner}, timeout=limit)
            if not inner.done():
                await self.stop_on_server(replica, rid)
                await asyncio.wait({inner}, timeout=min(limit, ABORT_GRACE_S))
            if not inner.done():
                await self.engine.watch.probe(replica)
                raise TryError(f"{replica.url}: no answer within {limit:g} s")
            await inner
        except asyncio.CancelledError:
            current = asyncio.current_task()
            given_up = current is not None and current.cancelling() > 0
            inner.cancel()
            await self.stop_on_server(replica, rid)
            if given_up:
                raise
            raise TryError(f"{replica.url} was lost: {replica.reason}", None) from None
        except ApiError as error:
            raise await self._try_error(replica, rid, error) from error
        finally:
            inner.cancel()
            replica.in_flight.discard(inner)

    async def _try_error(self, replica: Replica, rid: str, error: ApiError) -> TryError:
        """Return the failure of a try that got no answer, or an error. Raises the error if another try would, too."""
        if not error.may_pass:
            raise error
        await self.stop_on_server(replica, rid)
        if error.status is None:
            await self.engine.watch.probe(replica)
        return TryError(str(error))

    async def _take_in(self, sample: OpenSample, request: GenerationRequest, answer: RawAnswer, wanted: int) -> Reading:
        """Read an answer, and add what it holds of an unfinished response to the sample's beginning."""
        engine = self.engine
        asked = Asked(request.sampling, len(request.prompt_ids), engine.vocab_size, engine.stamp, engine.experts)
        reading = await engine.parsers.read(answer, asked)
        if reading.completion is not None:
            engine.usage.answer(len(reading.completion.token_ids), reading.counts)
        if reading.ending == "complete":
            return reading
        if reading.completion is None or self._problem_with_versions(reading.completion, wanted):
            engine.counts.lost_tokens += reading.tokens
        else:
            sample.beginning = joined(sample.beginning, reading.completion)
        return reading

    async def _failure(self, replica: Replica, rid: str, reading: Reading, blame: str | None) -> TryError:
        """Return why an answer that has ended is no sample. blame: who is to blame when it was aborted."""
        if reading.ending == "error":
            return await self._try_error(
                replica, rid, ApiError(replica.ask.url, "/generate", reading.problem, reading.status)
            )
        if reading.ending == "aborted":
            return TryError(f"{replica.url}: aborted: {reading.problem}", blame)
        if reading.ending == "unread":
            return TryError(f"{replica.url}: its answer could not be read: {reading.problem}", "sample")
        return TryError(f"{replica.url}: {reading.problem}")

    async def _completed(self, replica: Replica, sample: OpenSample, rest: Completion, wanted: int) -> Completion:
        if problem := self._problem_with_versions(rest, wanted):
            self.engine.counts.lost_tokens += len(rest.token_ids)
            if not self.config.router:  # which of the servers behind it has answered is not known
                await self.engine.watch.check_stamp(replica)
            raise TryError(f"{replica.url}: {problem}")
        if sample.beginning is not None:
            self.engine.counts.continued += 1
            self.engine.counts.kept_tokens += sample.tokens
        return self._checked(replica, sample, joined(sample.beginning, rest))

    def _checked(self, replica: Replica, sample: OpenSample, completion: Completion) -> Completion:
        """Return a completion, unless tokens of two versions are not wanted and it has them."""
        if completion.weight_versions.min() != completion.weight_versions.max():
            self.engine.mixed_versions += 1
            if self.config.mixed_versions == "drop":
                sample.beginning = None
                self.engine.counts.lost_tokens += len(completion.token_ids)
                raise TryError(f"{replica.url}: it was sampled with weights of two versions", "sample")
        return completion

    def _problem_with_versions(self, piece: Completion, wanted: int) -> str:
        return problem_with_versions(piece.weight_versions, wanted, self.engine.newest_version)


def request_body(request: GenerationRequest, index: int, deterministic: bool) -> dict[str, Any]:
    """Return the body of the request for sample `index`; `deterministic` servers get a seed."""
    settings = request.sampling
    sampling: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": -1 if settings.top_k is None else settings.top_k,
        "stop_token_ids": list(settings.stop_token_ids),
        # Only the stop tokens of the request end a response, as with every other engine.
        "ignore_eos": not settings.stop_token_ids,
    }
    if deterministic:
        sampling["sampling_seed"] = (request.seed + index) % 2**31
    return {
        "input_ids": request.prompt_ids.tolist(),
        "sampling_params": sampling,
        "return_logprob": True,
        "top_logprobs_num": settings.top_logprobs,
        "return_flat_raw_output_top_logprobs": bool(settings.top_logprobs),
        "return_flat_raw_top_logprobs_b64": bool(settings.top_logprobs),
    } | ({"return_routed_experts": True} if settings.routed_experts else {})

"""HTTP interface of one SGLang server: one coroutine per endpoint; errors are raised as ApiError.

Only endpoints of stock SGLang. `ServerInfo` says which optional ones a server has.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from packaging.version import Version

from megatron_hdpo.rollout.sglang.answers import NoCompletionError, decoded
from megatron_hdpo.rollout.sglang.reading import RawAnswer
from megatron_hdpo.rollout.sglang.servers.arguments import problem_of_server
from megatron_hdpo.rollout.sglang.servers.config import OLDEST_SGLANG

_SAME_WEIGHTS = frozenset({"/update_weights_from_tensor", "/update_weights_from_disk"})
"""Updates that hold or name their weights: a second one sets the same. A broadcast is not sent again."""


class ApiError(RuntimeError):
    """A server did not answer, or answered with an error. status: the HTTP status, None without an answer."""

    def __init__(self, url: str, path: str, reason: str, status: int | None = None) -> None:
        super().__init__(f"SGLang server {url}{path}: {reason}")
        self.status = status

    @property
    def may_pass(self) -> bool:
        """Return whether the same request may succeed later or elsewhere: no answer, overload, or a server error."""
        return self.status is None or self.status in (408, 429) or self.status >= 500


@dataclass(frozen=True)
class ServerInfo:
    """Properties that a server reports.

    model_path: folder of its current weights. tokenizer_path: folder it was started with. tensor_parallel: its ranks.
    expert_parallel: groups of ranks over which experts are distributed. max_prompt: longest prompt in
    tokens. max_sequence: longest prompt plus response in tokens, given its context and its key-value cache; a server
    cuts longer responses short without a word. cache: tokens of its key-value cache, 0 if it does not say. sessions:
    weight updates need a begin and an end call. memory: bytes of weights and key-value cache on each of its GPUs, 0 if
    it does not say. routed_experts: answers can hold the experts that a token was sent to. streams_increments: the
    pieces of a streamed answer hold the new tokens only, not all so far. stamp: of the weights that it was started
    with. refused: the argument of its start with which no run can use it, and why; "" for none.
    """

    version: str
    model_path: str
    tokenizer_path: str
    tensor_parallel: int
    expert_parallel: int
    dtype: str
    quantization: str | None
    max_prompt: int
    max_sequence: int
    cache: int
    max_running: int | None
    deterministic: bool
    sessions: bool
    memory_saver: bool
    memory: int
    routed_experts: bool
    streams_increments: bool
    stamp: str
    refused: str

    def problem_with(self, lengths: Mapping[str, int]) -> str:
        """Return how the server was started wrongly, which sequence it would cut short, or an empty string.

        lengths: tokens of prompt and response together, by the words for their settings.
        """
        if self.refused:
            return self.refused
        words, longest = max(lengths.items(), key=lambda item: item[1], default=("", 0))
        if longest <= self.max_sequence:
            return ""
        cache = f" (its key-value cache holds {self.cache})" if self.cache else ""
        return (
            f"it samples at most {self.max_sequence} tokens of prompt and response together{cache}, and {words} are "
            f"{longest}: lower one of them, or start the server with a longer context or a larger cache"
        )


class ServerApi:
    """Client of one server. The session is shared by all servers; its owner closes it. All times in seconds."""

    def __init__(self, session: aiohttp.ClientSession, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def post(self, path: str, body: dict[str, Any], timeout: float, repeatable: bool = False) -> Any:
        """Return the decoded answer to a POST.

        repeatable: it does no harm twice, so it is sent once more when the server has closed the connection without an
        answer, as it does with an idle one. A part in a broadcast would be taken twice. Raises ApiError on any status
        but 200 and on a missing or broken answer.
        """
        data = orjson.dumps(body)
        try:
            return await self._request("POST", path, data, timeout)
        except ApiError as error:
            if not repeatable or not isinstance(error.__cause__, aiohttp.ServerDisconnectedError):
                raise
            return await self._request("POST", path, data, timeout)

    async def get(self, path: str, timeout: float) -> Any:
        """Return the decoded answer to a GET; errors as in `post`."""
        return await self._request("GET", path, None, timeout)

    async def _request(self, method: str, path: str, data: bytes | None, timeout: float) -> Any:
        async with self._answered(method, path, data, timeout) as answer:
            return self._decoded(path, await answer.read())

    @asynccontextmanager
    async def _answered(
        self, method: str, path: str, data: bytes | None, timeout: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Hold the answer to a request, while its body is read. Raises ApiError on any status but 200."""
        headers = self._headers | {"Content-Type": "application/json"}
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self._session.request(
                method, self.url + path, data=data, headers=headers, timeout=limit
            ) as answer:
                if answer.status != 200:
                    reason = _reason(await answer.read())
                    raise ApiError(self.url, path, f"status {answer.status}: {reason}", answer.status)
                yield answer
        except TimeoutError as error:
            raise ApiError(self.url, path, f"no answer within {timeout:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ApiError(self.url, path, f"no answer: {error or type(error).__name__}") from error

    def _decoded(self, path: str, body: bytes) -> Any:
        try:
            return orjson.loads(body) if body else None
        except orjson.JSONDecodeError as error:
            raise ApiError(self.url, path, f"the answer is not JSON: {body[:200]!r}", 500) from error

    async def info(self, timeout: float = 30) -> ServerInfo:
        """Return the properties of the server. Raises ApiError, also when its version is too old."""
        said = await self.get("/server_info", timeout)
        version = str(said.get("version", "0"))
        if Version(version) < OLDEST_SGLANG:
            raise ApiError(self.url, "/server_info", f"is SGLang {version}; {OLDEST_SGLANG} or newer is needed", 501)
        return ServerInfo(
            version=version,
            model_path=str(said.get("model_path", "")),
            tokenizer_path=str(said.get("tokenizer_path", "")),
            tensor_parallel=int(said.get("tp_size", 1)),
            expert_parallel=int(said.get("ep_size") or 1),
            dtype=str(said.get("dtype", "auto")),
            quantization=said.get("quantization"),
            max_prompt=_max_prompt(said),
            max_sequence=_max_sequence(said),
            cache=int(said.get("max_total_num_tokens") or 0),
            max_running=said.get("max_running_requests"),
            deterministic=bool(said.get("enable_deterministic_inference")),
            sessions=await self._has("/begin_weight_update"),
            memory_saver=bool(said.get("enable_memory_saver")),
            memory=_memory(said),
            # Of tokens that were decoded speculatively a server (0.5.23) records no experts, or those of others.
            routed_experts=bool(said.get("enable_return_routed_experts")) and not said.get("speculative_algorithm"),
            streams_increments=bool(said.get("incremental_streaming_output")),
            stamp=str(said.get("weight_version", "default")),
            refused=problem_of_server(said),
        )

    async def stamp(self, timeout: float = 10) -> str:
        """Return the stamp of the weights that the server holds now."""
        answer = await self.get("/model_info", timeout)
        if not isinstance(answer, dict) or "weight_version" not in answer:
            raise ApiError(self.url, "/model_info", f"it does not say which weights it holds: {str(answer)[:200]}", 500)
        return str(answer["weight_version"])

    async def _has(self, path: str) -> bool:
        """Return whether a POST endpoint exists: a GET of it answers 405 if so, 404 if not."""
        try:
            await self.get(path, 30)
        except ApiError as error:
            if error.status == 404:
                return False
            if error.status != 405:
                raise
        return True

    async def alive(self, timeout: float = 5) -> bool:
        """Return whether the HTTP side answers; the scheduler behind it may still hang."""
        try:
            await self.get("/model_info", timeout)
        except ApiError:
            return False
        return True

    async def waiting(self, timeout: float = 5) -> int | None:
        """Return how many requests wait within the server for a place in its batch; None if it does not tell."""
        try:
            said = await self.get("/v1/loads?include=core", timeout)
            loads = [int(load["num_waiting_reqs"]) for load in said["loads"]]
        except (ApiError, KeyError, TypeError, ValueError):
            return None
        return sum(loads) if loads else None

    async def generate(self, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Return the answer to one sampling request, decoded."""
        async with self._answered("POST", "/generate", orjson.dumps(body), timeout) as answer:
            content = await answer.read()
        try:
            return decoded(content)
        except NoCompletionError as error:
            raise ApiError(self.url, "/generate", str(error), error.status) from error

    async def receive(self, answer: RawAnswer, body: dict[str, Any], timeout: float) -> None:
        """Fill `answer` with the bytes of the answer to one sampling request, as they arrive."""
        async with self._answered("POST", "/generate", orjson.dumps(body), timeout) as response:
            while piece := await response.content.readany():
                answer.add(piece)
        answer.ended = True

    async def abort(self, request_id: str, timeout: float = 10) -> None:
        """Stop sampling a request."""
        await self.post("/abort_request", {"rid": request_id}, timeout, repeatable=True)

    async def pause(self, mode: str, timeout: float) -> None:
        """Stop all generation: `retract` and `in_place` keep the running requests, `abort` returns them unfinished."""
        await self.post("/pause_generation", {"mode": mode}, timeout, repeatable=True)

    async def continue_generation(self, timeout: float) -> None:
        """Resume generation after `pause`."""
        await self.post("/continue_generation", {}, timeout, repeatable=True)

    async def update(self, path: str, body: dict[str, Any], timeout: float) -> None:
        """Make a call that answers {success, message}. Raises ApiError with the message when it failed."""
        answer = await self.post(path, body, timeout, repeatable=path in _SAME_WEIGHTS)
        if not answer.get("success"):
            raise ApiError(self.url, path, str(answer.get("message")), 400)

    async def checksums(self, timeout: float) -> list[dict[str, Any]]:
        """Return, for each rank of the server, its location and a checksum of each of its parameters."""
        answer = await self.post("/weights_checker", {"action": "checksum"}, timeout, repeatable=True)
        if not answer.get("success") or not answer.get("ranks"):
            raise ApiError(self.url, "/weights_checker", str(answer.get("message")), 400)
        return answer["ranks"]


def _max_prompt(said: dict[str, Any]) -> int:
    """Return the longest prompt in tokens: SGLang refuses one of max_req_input_len."""
    return int(said.get("max_req_input_len") or 2**31) - 1


def _max_sequence(said: dict[str, Any]) -> int:
    """Return the most tokens of prompt and response together.

    SGLang keeps two tokens of context or cache free, six with the four of max_req_input_len; of a cache in pages, one
    page and the rest of the prompt's last one.
    """
    limits = [int(said["max_req_input_len"]) + 4] if said.get("max_req_input_len") else []
    limits += [int(said["context_length"]) - 2] if said.get("context_length") else []
    if cache := said.get("max_total_num_tokens"):
        limits.append(int(cache) - 2 * int(said.get("page_size") or 1))
    return min(limits, default=2**31)


def _memory(said: dict[str, Any]) -> int:
    """Return the bytes that weights and key-value cache occupy on each GPU of a server; it reports GiB."""
    states = said.get("internal_states") or [{}]
    usage = states[0].get("memory_usage") or {}
    return int(2**30 * sum(usage.get(part) or 0.0 for part in ("weight", "kvcache")))


def _reason(body: bytes) -> str:
    """Return the message of an error answer, on one line."""
    try:
        said = orjson.loads(body)
        said = said.get("message") or said.get("error") or said.get("detail") or said
        said = said.get("message", said) if isinstance(said, dict) else said
    except (orjson.JSONDecodeError, AttributeError):
        said = body.decode(errors="replace")
    return " ".join(str(said).split())[:500]

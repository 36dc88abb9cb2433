"""Client of one reward service: requests in one event loop, tried again where another try may succeed."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_fixed
from tenacity.wait import wait_random_exponential

from megatron_hdpo.rewards.functions import HttpService
from megatron_hdpo.rewards.judgement import Judgement
from megatron_hdpo.rewards.service_answers import NoValue, no_answer, value_of
from megatron_hdpo.rewards.service_messages import LONGEST_ANSWER, Answer, request_body
from megatron_hdpo.types.breaker import Breaker
from megatron_hdpo.types.loop_thread import LoopThread
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.secrets import MARK, without_passwords

LOGGER = logging.getLogger(__name__)
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 20.0
"""Bounds of the random wait before another request: of the first wait, and of the later ones, each of which doubles."""
SHORTEST_SECRET = 6
"""Characters of a key or header from which it is hidden in messages: `X-Version: 1` is no secret."""
_POLL_S = 0.1
_HEALTH_TRIES = 3
_HEALTH_TIMEOUT_S = 10.0


class RewardService:
    """Asks a service for the values of responses. Any thread may `submit`; all else runs in the loop of `thread`.

    environment: variables of this process, for `api_key_variable`. Raises ValueError when that one is not set.
    """

    def __init__(self, config: HttpService, thread: LoopThread, environment: Mapping[str, str]) -> None:
        self.config = config
        self._thread = thread
        self._headers = _headers(config, environment)
        self._secrets = [self._headers.get("Authorization", "").removeprefix("Bearer "), *config.headers.values()]
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._tasks: set[asyncio.Task[Judgement]] = set()
        self._breaker = Breaker()
        self._out_since = 0.0

    def submit(self, problem: Problem, response: str) -> Future[Judgement]:
        """Ask for the value of a response. The future never fails; one of a closed service holds an error."""
        begin = time.monotonic()
        judgement: Future[Judgement] = Future()

        def settle(done: Future[Judgement]) -> None:
            error = None if done.cancelled() else done.exception()
            if done.cancelled() or error is not None:
                reason = "the service was closed before it answered" if error is None else _named(error)
                judgement.set_result(Judgement(None, self._without_secrets(reason), time.monotonic() - begin))
            else:
                judgement.set_result(done.result())

        try:
            self._thread.start(self._judged(problem, response)).add_done_callback(settle)
        except RuntimeError as error:  # the loop is closed
            judgement.set_result(Judgement(None, str(error), 0.0))
        return judgement

    def check(self) -> None:
        """Ask whether the service is there, if it can be asked. Raises ValueError with the reason when it is not."""
        if self.config.health_url is not None:
            try:
                self._thread.run(self._ask_health(self.config.health_url))
            except NoValue as error:
                address = without_passwords(self.config.health_url)
                raise ValueError(self._without_secrets(f"{address}: {error}")) from error

    def close(self) -> None:
        """End all requests: what was not answered comes back as failed. Idempotent."""
        self._thread.run(self._end())

    async def _end(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _judged(self, problem: Problem, response: str) -> Judgement:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        begin = time.monotonic()
        try:
            sample = uuid.uuid4().hex
            answer = await self._in_a_slot(request_body(problem, response, sample), sample)
        except NoValue as error:
            return Judgement(None, self._without_secrets(str(error)), time.monotonic() - begin)
        return Judgement(answer.reward, None, time.monotonic() - begin, answer.feedback)

    async def _in_a_slot(self, body: bytes, sample: str) -> Answer:
        """Return the answer for a response. Raises NoValue with the last cause, and how often it was asked for."""
        requests = 0
        async with self._slots:
            begin = time.monotonic()
            deadline = begin + self.config.deadline_s
            tries = AsyncRetrying(
                retry=retry_if_exception(lambda error: isinstance(error, NoValue) and error.may_pass),
                stop=self._gives_up(deadline),
                wait=_wait,
                reraise=True,
            )
            try:
                async for attempt in tries:
                    with attempt:
                        is_trial = await self._turn(deadline)
                        requests += 1
                        return await self._asked(body, sample, deadline, is_trial)
            except NoValue as error:
                if requests < 2:
                    raise
                spent = time.monotonic() - begin
                raise NoValue(f"{error} (after {requests} requests in {spent:.0f} s)") from error
        raise AssertionError("a last try returns or raises")

    def _gives_up(self, deadline: float) -> Callable[[RetryCallState], bool]:
        """Return the rule when no further request is made: after max_retries failures, or where none fits."""
        failures = 0

        def stop(state: RetryCallState) -> bool:
            nonlocal failures
            failures += not _error_of(state).is_busy
            return failures > self.config.max_retries or time.monotonic() + state.upcoming_sleep >= deadline

        return stop

    async def _turn(self, deadline: float) -> bool:
        """Wait while the service is out of order; return whether this request is the one that tries it again.

        Raises NoValue when the outage takes longer than a sample may take.
        """
        breaker = self._breaker
        while breaker.state != "closed":
            if breaker.due:
                breaker.state = "half_open"
                return True
            now = time.monotonic()
            if now >= min(deadline, self._out_since + self.config.deadline_s):
                raise NoValue(f"the service has been out of order for {now - self._out_since:.0f} s: {breaker.reason}")
            await asyncio.sleep(_POLL_S)
        return False

    async def _asked(self, body: bytes, sample: str, deadline: float, is_trial: bool) -> Answer:
        """Return the answer to one request, and let the breaker know how it went. Raises NoValue."""
        try:
            answer = value_of(*await self._post(body, min(self.config.timeout_s, deadline - time.monotonic())))
        except NoValue as error:
            self._note(sample, error if error.is_outage else None)
            raise
        except BaseException:  # cancelled: the next one tries
            if is_trial:
                self._breaker.stay_open()
            raise
        self._note(sample, None)
        return answer

    def _note(self, sample: str, outage: NoValue | None) -> None:
        name = self.config.function_name
        if outage is None:
            if self._breaker.succeed():
                LOGGER.info("reward service %s answers again", name)
        elif self._breaker.fail(sample, str(outage)):
            self._out_since = time.monotonic()
            reason = self._without_secrets(str(outage))
            LOGGER.warning("reward service %s is out of order: %s; samples wait for it", name, reason)

    async def _post(self, body: bytes, limit_s: float) -> tuple[int, Mapping[str, str], bytes]:
        """Return status, headers and body of the answer to one request. Raises NoValue without one."""
        timeout = aiohttp.ClientTimeout(total=max(limit_s, 0.001))
        try:
            async with self._opened().post(
                self.config.url, data=body, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as answer:
                return answer.status, answer.headers, await _beginning(answer.content)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise no_answer(error, limit_s) from error

    async def _ask_health(self, url: str) -> None:
        timeout = min(self.config.timeout_s, _HEALTH_TIMEOUT_S)
        tries = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, NoValue) and error.may_pass),
            stop=stop_after_attempt(_HEALTH_TRIES),
            wait=wait_fixed(FIRST_WAIT_S),
            reraise=True,
        )
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as session:
            async for attempt in tries:
                with attempt:
                    await self._check_once(session, url, timeout)

    async def _check_once(self, session: aiohttp.ClientSession, url: str, timeout: float) -> None:
        try:
            async with session.get(url, headers=self._headers) as answer:
                status = answer.status
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise no_answer(error, timeout) from error
        if status != 200:
            raise NoValue(f"status {status}", may_pass=status >= 500)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=self.config.max_concurrent))
        return self._session

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            if len(secret) >= SHORTEST_SECRET:
                text = text.replace(secret, MARK)
        return without_passwords(text)


def _headers(config: HttpService, environment: Mapping[str, str]) -> dict[str, str]:
    key = config.api_key
    if config.api_key_variable is not None:
        key = environment.get(config.api_key_variable)
        if not key:
            raise ValueError(f"api_key_variable: the environment variable {config.api_key_variable} is not set")
    authorization = {"Authorization": f"Bearer {key}"} if key else {}
    return {"Content-Type": "application/json"} | authorization | config.headers


async def _beginning(stream: aiohttp.StreamReader) -> bytes:
    """Return an answer up to the longest that is read, and one byte more of a longer one."""
    read = bytearray()
    while len(read) <= LONGEST_ANSWER and (piece := await stream.read(LONGEST_ANSWER + 1 - len(read))):
        read += piece
    return bytes(read)


def _wait(state: RetryCallState) -> float:
    """Return the wait before the next request: random, and no shorter than the service asks for."""
    backoff = wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)(state)
    return max(backoff, _error_of(state).wait_s)


def _error_of(state: RetryCallState) -> NoValue:
    error = None if state.outcome is None else state.outcome.exception()
    assert isinstance(error, NoValue)
    return error


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"

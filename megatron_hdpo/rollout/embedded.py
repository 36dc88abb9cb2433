"""Embedded rollout engine: `transformers` on the trainer's own device, with its own batched decoding loop.

A prompt is prefilled once and its keys and values are copied to its n samples. All samples of all requests decode
together, one slot each. A finished sample frees its slot at once, and waiting requests are admitted as soon as enough
slots are free.

Determinism: a sample is drawn from its own logits with uniforms keyed by (request.seed, sample index), so it depends
neither on the batch around it nor on the number of ranks, and the same requests submitted in the same order give the
same bits on the same machine. What remains is floating point: matrix products round differently for different batch
shapes, and a draw within that error of the edge between two tokens can change, after which the two texts differ. In
float32 log-probs move by about 1e-5 and such draws are rare. In bfloat16 they move by up to 0.1, and a sample alone and
the same sample in a batch differ sooner or later: the flatter the distribution, the sooner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import Cache, PretrainedConfig

from megatron_hdpo.rollout.config import EmbeddedEngineConfig
from megatron_hdpo.rollout.embedded_model import EmbeddedModel
from megatron_hdpo.rollout.embedded_state import PendingRequest, SequenceState
from megatron_hdpo.rollout.engine import WeightStream
from megatron_hdpo.rollout.request_check import problem_with
from megatron_hdpo.rollout.token_sampling import Draw, RowParams, row_params, sample, uniforms
from megatron_hdpo.types.rollouts import FinishReason, GenerationRequest, GenerationResult
from megatron_hdpo.types.transfer import to_device


class EmbeddedEngine:
    """Engine on `transformers`; implements the Engine protocol. Not thread-safe.

    model: a Hugging Face configuration, or the path of its config.json or of the folder that holds it; weights are
    loaded by `update_weights`. Raises ValueError while `config.dtype` is auto.
    """

    deterministic = True

    def __init__(
        self,
        model: PretrainedConfig | str | Path,
        config: EmbeddedEngineConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        if config.dtype == "auto":
            raise ValueError("EmbeddedEngineConfig.dtype: auto is not resolved yet: pass the precision of the model")
        self.config = config
        self._device = torch.device(device)
        dtype = getattr(torch, self.config.dtype)
        self._model = EmbeddedModel(model, dtype, self._device, self.config.vocab_size)
        self._cache = self._model.new_cache(self.config.max_batch_tokens)
        self._version = -1
        self._unusable = "no weights yet: call update_weights"
        self._waiting: deque[PendingRequest] = deque()
        self._active: list[SequenceState] = []  # row r of the cache belongs to _active[r]
        self._params: RowParams | None = None  # of _active; None when it changed
        self._outstanding: set[str] = set()
        self._finished: deque[GenerationResult] = deque()

    @property
    def slots(self) -> int:
        """Most samples that decode together."""
        return self.config.max_batch_sequences

    @property
    def weight_version(self) -> int:
        """Version passed to the last completed `update_weights`; -1 before the first."""
        return self._version

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests, all or none. Raises ValueError on a request that cannot be served."""
        taken = set(self._outstanding)
        for request in requests:
            self._validate(request)
            if request.request_id in taken:
                raise ValueError(f"request {request.request_id}: this id is already outstanding")
            taken.add(request.request_id)
        self._outstanding = taken
        self._waiting.extend(PendingRequest(request) for request in requests)

    def results(self) -> Iterator[GenerationResult]:
        """Yield finished requests in order of completion, until none is outstanding.

        Sampling advances only while this is read. Raises RuntimeError when there are no usable weights. An exception of
        the model itself (out of memory) drops every outstanding request and is passed on.
        """
        while True:
            while self._finished:
                yield self._finished.popleft()
            if not self._waiting and not self._active:
                return
            if self._unusable:
                raise RuntimeError(f"embedded engine cannot sample: {self._unusable}")
            try:
                self._advance()
            except BaseException:
                self._drop_outstanding()
                raise

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Cancel these requests with all their samples: a request's samples are returned together."""
        wanted = self._outstanding.intersection(request_ids) - {result.request_id for result in self._finished}
        pending = {p.request.request_id: p for p in (*self._waiting, *(s.pending for s in self._active))}
        self._waiting = deque(p for p in self._waiting if p.request.request_id not in wanted)
        self._remove([row for row, s in enumerate(self._active) if s.pending.request.request_id in wanted])
        for request_id in sorted(wanted):
            self._outstanding.discard(request_id)
            self._finished.append(GenerationResult(request_id, [], cancelled=pending[request_id].request.sampling.n))

    def update_weights(self, stream: WeightStream, version: int) -> None:
        """Replace all weights; see the protocol.

        Samples in progress continue with the new weights and the old keys and values; `Completion.weight_versions`
        holds the version of each token. Raises ValueError on weights that do not fit the model; then a full update must
        follow.
        """
        self._unusable = f"the update to version {version} did not complete; a full one must follow"
        self._model.load(stream)
        self._version = version
        self._unusable = ""

    def metrics(self) -> dict[str, float]:
        """Return nothing: there are no servers."""
        return {}

    def make_room(self) -> None:
        """Do nothing: where this engine is used, there is memory for the trainer, weights and cache."""

    def release(self) -> None:
        """Free the memory of weights and cache for a trainer on the same device, until the next `update_weights`.

        Raises RuntimeError while requests are outstanding.
        """
        if self._waiting or self._active:
            raise RuntimeError(f"release with {len(self._outstanding)} requests outstanding: read results() first")
        self._unusable = "memory was released: call update_weights"
        self._model.release()
        self._cache.drop()

    def close(self) -> None:
        """Drop outstanding requests and free the memory. Idempotent."""
        self._drop_outstanding()
        self.release()
        self._unusable = "closed"

    def _drop_outstanding(self) -> None:
        self._waiting.clear()
        self._active.clear()
        self._finished.clear()
        self._outstanding.clear()
        self._params = None

    def _validate(self, request: GenerationRequest) -> None:
        problem = problem_with(request, self._model.vocab_size, self._model.context_length)
        total = len(request.prompt_ids) + request.sampling.max_new_tokens
        if not problem and request.sampling.routed_experts and not self._model.has_experts:
            problem = "routed experts are requested, but the model has no experts"
        if not problem and total > self.config.max_batch_tokens:
            problem = f"prompt plus response of {total} tokens exceed max_batch_tokens {self.config.max_batch_tokens}"
        if problem:
            raise ValueError(f"request {request.request_id}: {problem}")

    @torch.inference_mode()  # around the whole step: writes into the cache must happen under it too
    def _advance(self) -> None:
        """Admit what fits, then decode one token for every active sample."""
        self._admit()
        if self._active:
            logits_BV = self._model.decode(
                np.array([s.ids[-1] for s in self._active]), np.array([s.cached for s in self._active]), self._cache
            )
            for sequence in self._active:
                sequence.cached += 1
            self._note_experts(self._active, range(len(self._active)))
            if self._params is None:
                self._params = self._row_params(self._active)
            ended = self._sample(self._active, logits_BV, self._params)
            self._remove(ended)

    def _admit(self) -> None:
        """Move waiting requests into free slots, when enough slots are free to justify a prefill."""
        limit = self.config.max_batch_sequences
        if self._active and limit - len(self._active) < max(1, self.config.refill_fraction * limit):
            return
        admitted: list[tuple[PendingRequest, int]] = []
        rows = len(self._active)
        longest = max((self._final_length(s.pending.request) for s in self._active), default=0)
        while self._waiting:
            pending = self._waiting[0]
            wanted = pending.request.sampling.n - pending.admitted
            longest = max(longest, self._final_length(pending.request))
            room = min(limit, self.config.max_batch_tokens // longest) - rows
            # Only a request that could never fit as a whole is split; its prompt is then prefilled for each part.
            count = wanted if wanted <= room else room if rows == 0 else 0
            if count <= 0:
                break
            admitted.append((pending, count))
            rows += count
            if count < wanted:
                break
            self._waiting.popleft()
        for batch in self._prefill_batches(admitted):
            self._prefill(batch)

    @staticmethod
    def _final_length(request: GenerationRequest) -> int:
        return len(request.prompt_ids) + request.sampling.max_new_tokens

    def _prefill_batches(
        self, admitted: list[tuple[PendingRequest, int]]
    ) -> Iterator[list[tuple[PendingRequest, int]]]:
        """Yield batches of prompts of similar length, within the token budget of one pass."""
        batch: list[tuple[PendingRequest, int]] = []
        for item in sorted(admitted, key=lambda item: len(item[0].request.prompt_ids)):
            if batch and (len(batch) + 1) * len(item[0].request.prompt_ids) > self.config.prefill_tokens:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _prefill(self, batch: list[tuple[PendingRequest, int]]) -> None:
        """Run the prompts, sample the first token of every new sample, and give slots to the samples that continue."""
        prompts = [pending.request.prompt_ids for pending, _ in batch]
        logits_RV, prefilled = self._model.prefill(prompts)
        sequences: list[SequenceState] = []
        sources: list[int] = []
        for source, (pending, count) in enumerate(batch):
            request = pending.request
            for index in range(pending.admitted, pending.admitted + count):
                numbers = uniforms(request.seed, index, request.sampling.max_new_tokens)
                sequences.append(SequenceState(pending, index, numbers, cached=len(request.prompt_ids)))
                sources.append(source)
            pending.admitted += count
        self._note_experts(sequences, sources)
        logits_BV = logits_RV[to_device(torch.tensor(sources), self._device)]
        ended = set(self._sample(sequences, logits_BV, self._row_params(sequences)))
        self._insert([s for r, s in enumerate(sequences) if r not in ended], batch, prefilled)

    def _insert(
        self, sequences: list[SequenceState], batch: list[tuple[PendingRequest, int]], prefilled: Cache
    ) -> None:
        """Copy each prompt's keys and values to the slots of its samples."""
        if not sequences:
            return
        first = len(self._active)
        longest = max(s.cached for s in (*self._active, *sequences))
        self._cache.reserve(first + len(sequences), longest + 1, like=prefilled)
        row = first
        for source, (pending, _) in enumerate(batch):
            count = sum(s.pending is pending for s in sequences)
            if count:
                self._cache.insert(row, count, prefilled, source, len(pending.request.prompt_ids))
                row += count
        self._active.extend(sequences)
        self._params = None

    def _row_params(self, sequences: list[SequenceState]) -> RowParams:
        settings = [s.pending.request.sampling for s in sequences]
        return row_params(
            [s.temperature for s in settings],
            [s.top_k for s in settings],
            [s.top_p for s in settings],
            self._model.vocab_size,
            self._device,
        )

    def _sample(self, sequences: list[SequenceState], logits_BV: torch.Tensor, params: RowParams) -> list[int]:
        """Draw one token per row; return the rows that ended."""
        u_B2 = to_device(torch.from_numpy(np.stack([s.uniforms[len(s.ids)] for s in sequences])), self._device)
        top = max(s.pending.request.sampling.top_logprobs for s in sequences)
        return self._record(sequences, sample(logits_BV, u_B2, params, top))

    def _record(self, sequences: list[SequenceState], draw: Draw) -> list[int]:
        """Append the drawn tokens and close samples that end; return the rows that ended."""
        # In float64, which holds each of them exactly, they are read from the device at once.
        ids, logprobs, finite = torch.stack([draw.ids_B.double(), draw.logprobs_B, draw.finite_B]).tolist()
        if draw.top_ids_BK is not None and draw.top_logprobs_BK is not None:
            top_ids, top_logprobs = draw.top_ids_BK.int().cpu().numpy(), draw.top_logprobs_BK.cpu().numpy()
        ended = []
        for row, sequence in enumerate(sequences):
            if not finite[row]:
                self._fail(sequence, f"logits are not finite at response token {len(sequence.ids)}")
                ended.append(row)
                continue
            sampling = sequence.pending.request.sampling
            sequence.ids.append(int(ids[row]))
            sequence.logprobs.append(logprobs[row])
            sequence.versions.append(self._version)
            if sampling.top_logprobs:
                sequence.top_ids.append(top_ids[row, : sampling.top_logprobs])
                sequence.top_logprobs.append(top_logprobs[row, : sampling.top_logprobs])
            if ids[row] in sampling.stop_token_ids:
                self._finish(sequence, "stop")
                ended.append(row)
            elif len(sequence.ids) == sampling.max_new_tokens:
                self._finish(sequence, "length")
                ended.append(row)
        return ended

    def _note_experts(self, sequences: Sequence[SequenceState], sources: Sequence[int]) -> None:
        """Store the experts that the last pass chose for each sequence's tokens. sources: its row in that pass."""
        if not any(sequence.pending.request.sampling.routed_experts for sequence in sequences):
            return
        experts_BPLK = self._model.experts_of_last_pass()
        for sequence, row in zip(sequences, sources, strict=True):
            if sequence.pending.request.sampling.routed_experts:
                prompt = len(sequence.pending.request.prompt_ids)
                sequence.experts.append(experts_BPLK[row, : prompt if not sequence.ids else 1])

    def _finish(self, sequence: SequenceState, reason: FinishReason) -> None:
        sequence.pending.completions[sequence.index] = sequence.completion(reason)
        self._hand_over(sequence.pending)

    def _fail(self, sequence: SequenceState, reason: str) -> None:
        sequence.pending.errors[sequence.index] = f"sample {sequence.index}: {reason}"
        self._hand_over(sequence.pending)

    def _hand_over(self, pending: PendingRequest) -> None:
        if pending.finished:
            self._outstanding.discard(pending.request.request_id)
            self._finished.append(pending.result())

    def _remove(self, ended: list[int]) -> None:
        """Close the gaps: rows from the end move into freed slots, so that the active rows stay a prefix."""
        if not ended:
            return
        gone = set(ended)
        keep = len(self._active) - len(ended)
        holes = [row for row in ended if row < keep]
        movers = [row for row in range(keep, len(self._active)) if row not in gone]
        if holes:
            self._cache.move(movers, holes, max(self._active[row].cached for row in movers))
            for mover, hole in zip(movers, holes, strict=True):
                self._active[hole] = self._active[mover]
        del self._active[keep:]
        self._params = None

"""Measure the embedded rollout engine against `model.generate` of transformers, on the same requests in the same run.

    python tools/bench_embedded.py --model FOLDER --threads 1 2 --dtypes float32 bfloat16

Without --model the weights are random, in the shape of SmolLM2-135M: the speed does not depend on their values. There
are no stop tokens, so both sides generate the same number of tokens. `even`: all requests are equally long; `ragged`:
request i of R asks for (i + 1) / R of --new-tokens, as responses of different lengths do. The engine returns log-probs,
generate does not. Best of --repeats.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import _environment  # noqa: F401
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from megatron_hdpo.rollout.config import EmbeddedEngineConfig
from megatron_hdpo.rollout.embedded import EmbeddedEngine
from megatron_hdpo.types.rollouts import GenerationRequest, SamplingParams


def main() -> None:
    """Measure every case of the command line and print the table."""
    options = parse_options()
    table = Table(
        title=f"{options.prompts} prompts x {options.samples} samples, prompts of {options.prompt_tokens} tokens"
    )
    for column in ("threads", "dtype", "requests", "tokens", "engine tok/s", "generate tok/s", "ratio"):
        table.add_column(column, justify="right")
    cases = [(t, d, r) for t in options.threads for d in options.dtypes for r in (False, True)]
    for threads, dtype, ragged in track(cases, description="measuring"):
        torch.set_num_threads(threads)
        model = load_model(options.model, getattr(torch, dtype))
        requests = make_requests(options, model.config.vocab_size, ragged)
        tokens = sum(r.sampling.n * r.sampling.max_new_tokens for r in requests)
        engine = EmbeddedEngine(model.config, EmbeddedEngineConfig(dtype=dtype, max_batch_sequences=options.batch))
        engine.update_weights(model.named_parameters(), version=0)
        ours = tokens / best_time(lambda e=engine, r=requests: run_engine(e, r), options.repeats)
        theirs = tokens / best_time(lambda m=model, r=requests: run_generate(m, r), options.repeats)
        kind = "ragged" if ragged else "even"
        table.add_row(str(threads), dtype, kind, str(tokens), f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}")
    console = Console()
    console.print(table)
    console.print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder with config.json and safetensors")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=80, help="mean; the prompts differ by up to a fifth")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=64, help="engine's max_batch_sequences")
    parser.add_argument("--repeats", type=int, default=2)
    return parser.parse_args()


def load_model(folder: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a folder, or a random one in the shape of SmolLM2-135M."""
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_requests(options: argparse.Namespace, vocab_size: int, ragged: bool) -> list[GenerationRequest]:
    """Return the requests, equally long or (ragged) of different lengths."""
    rng = np.random.default_rng(0)
    requests = []
    for index in range(options.prompts):
        length = round(options.prompt_tokens * rng.uniform(0.8, 1.2))
        new = options.new_tokens * (index + 1) // options.prompts if ragged else options.new_tokens
        prompt = rng.integers(3, vocab_size, length).astype(np.int32)
        sampling = SamplingParams(max(1, new), n=options.samples)
        requests.append(GenerationRequest(f"{index}", prompt, sampling, seed=index))
    return requests


def run_engine(engine: EmbeddedEngine, requests: list[GenerationRequest]) -> None:
    """Generate all requests with the engine. Raises RuntimeError on a failed sample."""
    engine.submit(requests)
    for result in engine.results():
        if result.errors:
            raise RuntimeError(result.errors[0])


def run_generate(model: PreTrainedModel, requests: list[GenerationRequest]) -> None:
    """Generate all prompts in one left-padded batch, as long as the longest request."""
    width = max(len(r.prompt_ids) for r in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt_ids) :] = torch.from_numpy(request.prompt_ids.astype(np.int64))
        mask[row, width - len(request.prompt_ids) :] = 1
    new = max(r.sampling.max_new_tokens for r in requests)
    model.generation_config.eos_token_id = None
    settings = dict(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=new, pad_token_id=0)
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, num_return_sequences=requests[0].sampling.n, **settings)


def best_time(work: Callable[[], None], repeats: int) -> float:
    """Return the shortest time of several repeats, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()

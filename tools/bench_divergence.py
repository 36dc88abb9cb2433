"""Measure time and memory of the divergence engine against cross-entropy and other implementations, in one table.

    python tools/bench_divergence.py                                     # CPU, the figures of docs/divergence.md
    python tools/bench_divergence.py --vocab 32768 131072 151936 --k 16 64 256 --no-head
    python tools/bench_divergence.py --tp 2                              # two gloo (CUDA: NCCL) ranks
    python tools/bench_divergence.py --device cuda --tokens 8192 --dtype bfloat16 --vocab 151936
    python tools/bench_divergence.py --nemo-rl ../RL                     # beside NeMo-RL's functions in this checkout
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python tools/bench_divergence.py

Every contender computes forward and backward on the same logits. They take turns, `--repeats` times, and the median is
reported. On a CPU `ms` is processor time of the one thread, which other programs disturb less than wall-clock time;
`wall ms` is wall-clock time. Extra memory is the peak above the memory in use before, without the storage of the
logits; for the head it excludes the gradients and includes the unchunked logits.
On CUDA the kernels are first checked against the torch path, and `copy %` is the least possible traffic (one read
forward, one read and one write backward) relative to the measured bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _environment  # noqa: F401
import _nemo_rl

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler, which counts memory here, is chatty

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_hdpo.divergence import (
    JSD,
    DivergenceSpec,
    FullLogits,
    TopK,
    divergence,
    head_loss,
    head_losses,
    logit_losses,
)
from megatron_hdpo.divergence import vocab_parallel_topk as topk_of

Contender = Callable[[Tensor], Tensor]


class _AsOutput(torch.autograd.Function):
    """Returns a tensor as if a layer had just made it: contenders may overwrite it, as they do in training."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True)
class Setting:
    """One size of the problem on one rank."""

    tokens: int
    vocab: int
    k: int
    tp: int
    dtype: str
    device: str
    rank: int
    group: Any

    def tensors(self) -> tuple[Tensor, Tensor, TopK, Tensor]:
        """Return this rank's logits, sampled ids, the teacher's top-k and the teacher's logits."""
        gen = torch.Generator().manual_seed(0)
        dtype, width = getattr(torch, self.dtype), self.vocab // self.tp
        mine = slice(self.rank * width, (self.rank + 1) * width)
        logits = (2 * torch.randn(self.tokens, self.vocab, generator=gen))[:, mine].to(self.device, dtype).contiguous()
        teacher = (2 * torch.randn(self.tokens, self.vocab, generator=gen))[:, mine].to(self.device, dtype)
        ids = torch.randint(0, self.vocab, (self.tokens,), generator=gen).to(self.device)
        return logits, ids, topk_of(teacher, self.k, self.group), teacher.contiguous()


def contenders(
    setting: Setting, full: bool, nemo_rl: Path | None = None
) -> tuple[Tensor, dict[str, Contender], dict[str, str]]:
    """Return the logits, the contenders that can run here by name, and why the others cannot.

    Each contender maps logits to a sum of per-token losses. nemo_rl: a checkout of NVIDIA-NeMo/RL.
    """
    logits, ids, topk, teacher = setting.tensors()
    group = setting.group
    runs, missing = _cross_entropies(ids), {}

    def ours(spec: DivergenceSpec = JSD) -> Contender:
        return lambda z: divergence(z, topk, spec, group=group, inplace_backward=True).sum()

    def everything(z: Tensor) -> Tensor:
        losses = logit_losses(z, ids, topk, group=group, inplace_backward=True)
        assert losses.logprobs_T is not None and losses.entropy_T is not None and losses.divergence_T is not None
        return (losses.logprobs_T + losses.entropy_T + losses.divergence_T).sum()

    runs["top-k JSD, outside"] = ours()
    runs["top-k JSD, outside, new gradient"] = lambda z: divergence(z, topk, group=group).sum()
    runs["top-k JSD, bucket"] = ours(DivergenceSpec(tail="bucket"))
    runs["top-k forward KL, outside"] = ours(DivergenceSpec("forward_kl"))
    runs["top-k reverse KL, bucket"] = ours(DivergenceSpec("reverse_kl", tail="bucket"))
    runs["top-k JSD, renormalise"] = ours(DivergenceSpec(tail="renormalise"))
    runs["log-prob + entropy + top-k JSD"] = everything
    if full:
        target = FullLogits(teacher)
        for kind in ("jsd", "forward_kl", "reverse_kl", "skew_forward", "skew_reverse"):
            runs[f"full {kind}"] = lambda z, kind=kind: divergence(
                z, target, DivergenceSpec(kind), group=group, inplace_backward=True
            ).sum()
        if setting.tp == 1:
            runs["plain torch full JSD"] = lambda z: _plain_jsd(z, teacher)
    _add_liger(runs, missing, teacher, setting)
    if nemo_rl is None:
        missing["NeMo-RL"] = "--nemo-rl names no checkout of it"
    else:
        runs |= _nemo_rl.contenders(nemo_rl, topk)
    return logits, runs, missing


def _cross_entropies(ids: Tensor) -> dict[str, Contender]:
    from megatron.core import tensor_parallel
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    return {
        "vocab_parallel_cross_entropy": lambda z: tensor_parallel.vocab_parallel_cross_entropy(z, ids).sum(),
        "fused_vocab_parallel_cross_entropy": lambda z: fused_vocab_parallel_cross_entropy(
            z, ids, get_tensor_model_parallel_group()
        ).sum(),
    }


def _plain_jsd(z: Tensor, teacher: Tensor) -> Tensor:
    """Compute the full-vocabulary JSD in plain torch."""
    lq, lp = z.float().log_softmax(-1), teacher.float().log_softmax(-1)
    lm = torch.logsumexp(torch.stack([lp, lq]), dim=0) - 0.6931471805599453
    legs = lp.exp() * (lp - lm) + lq.exp() * (lq - lm)
    return 0.5 * legs.sum()


def _add_liger(runs: dict[str, Contender], missing: dict[str, str], teacher: Tensor, setting: Setting) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        missing["Liger JSD"] = "liger-kernel is not installed"
    elif setting.device != "cuda" or setting.tp > 1:
        missing["Liger JSD"] = "needs CUDA and one rank"
    else:
        from liger_kernel.transformers import LigerJSD

        liger, log_teacher = LigerJSD(beta=0.5), teacher.float().log_softmax(-1)
        runs["Liger JSD (mean over tokens)"] = lambda z: liger(z.float().log_softmax(-1), log_teacher)


def one_step(run: Contender, logits: Tensor, anchor: Tensor) -> None:
    """Run forward and backward of a contender."""
    loss = run(_AsOutput.apply(anchor, logits))
    loss.backward()


def clock(device: str) -> float:
    """Return the wall-clock time in seconds, once the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_extra(step: Callable[[], None], device: str) -> int:
    """Return the bytes allocated at the peak of a step, above those before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@dataclass
class Row:
    """One line of the table: medians over the repeats, extra memory in bytes."""

    name: str
    setting: dict[str, Any]
    ms: float
    wall_ms: float
    extra_bytes: int
    logits_bytes: int
    relative: float = 0.0
    copy_percent: float | None = None

    def line(self) -> str:
        """Return the row as text."""
        s = self.setting
        extra = f"{self.extra_bytes / 2**20:9.1f} {100 * self.extra_bytes / self.logits_bytes:8.1f}"
        copy = "" if self.copy_percent is None else f" {self.copy_percent:7.0f}"
        size = f"{s['vocab']:>7} {s['tokens']:>6} {s['k']:>4} {s['tp']:>3}"
        return f"{self.name:38} {size} {self.ms:9.1f} {self.wall_ms:9.1f} {self.relative:8.2f} {extra}{copy}"


HEADER = f"{'':38} {'V':>7} {'T':>6} {'k':>4} {'tp':>3} {'ms':>9} {'wall ms':>9} {'x CE':>8}"
HEADER += f" {'extra MiB':>9} {'% logits':>8}"


def measure(
    setting: Setting, repeats: int, full: bool, nemo_rl: Path | None = None
) -> tuple[list[Row], dict[str, str]]:
    """Measure all contenders; return their rows, and why the others did not run."""
    master, runs, missing = contenders(setting, full, nemo_rl)
    logits, anchor = master.clone(), torch.zeros((), device=setting.device, requires_grad=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs):
            logits.copy_(master)
            start, cpu = clock(setting.device), time.thread_time()
            try:
                one_step(runs[name], logits, anchor)
            except Exception as error:  # report contenders that do not run here
                missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
                del runs[name], times[name]
                continue
            wall = clock(setting.device) - start
            if turn:
                times[name].append((wall if setting.device == "cuda" else time.thread_time() - cpu, wall))
    shown = {k: v for k, v in vars(setting).items() if k not in ("group", "rank")}
    rows = []
    for name, run in runs.items():
        logits.copy_(master)
        extra = peak_extra(lambda run=run: one_step(run, logits, anchor), setting.device)
        cpu_s, wall_s = (statistics.median(column) for column in zip(*times[name], strict=True))
        size = master.numel() * master.element_size()
        rows.append(Row(name, shown, ms=1e3 * cpu_s, wall_ms=1e3 * wall_s, extra_bytes=extra, logits_bytes=size))
    for row in rows:
        row.relative = row.ms / rows[0].ms
        if setting.device == "cuda":
            least_s = 3 * row.logits_bytes / copy_bandwidth()
            row.copy_percent = 100 * least_s / (row.ms / 1e3)
    return rows, missing


def measure_head(tokens: int, vocab: int, hidden: int, k: int, chunk: int, repeats: int, device: str) -> list[Row]:
    """Measure head_losses and head_loss against the same losses from unchunked logits (in-place gradient)."""
    gen = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=gen).to(device).requires_grad_()
    head = (torch.randn(vocab, hidden, generator=gen) * hidden**-0.5).to(device).requires_grad_()
    ids = torch.randint(0, vocab, (tokens,), generator=gen).to(device)
    teacher = torch.randn(tokens, vocab, generator=gen).to(device)
    topk = topk_of(teacher, k)
    del teacher

    def objective(losses: Any, places: Tensor | None = None) -> Tensor:
        return (losses.divergence_T - 0.5 * losses.logprobs_T).sum()

    def unchunked() -> None:
        objective(logit_losses(states @ head.t(), ids, topk, inplace_backward=True)).backward()

    ways: dict[str, Callable[[], None]] = {
        "unchunked head": unchunked,
        "head_loss (one go)": lambda: head_loss(states, head, ids, objective, topk, chunk=chunk)[0].backward(),
        "head_losses (remakes logits)": lambda: objective(head_losses(states, head, ids, topk, chunk=chunk)).backward(),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    extra = {}
    gradients = (states.numel() + head.numel()) * states.element_size()
    for turn in range(repeats + 1):
        for name, way in ways.items():
            states.grad = head.grad = None
            if not turn:
                extra[name] = peak_extra(way, device) - gradients
                continue
            start, cpu = clock(device), time.thread_time()
            way()
            wall = clock(device) - start
            times[name].append((wall if device == "cuda" else time.thread_time() - cpu, wall))
    shown = dict(tokens=tokens, vocab=vocab, k=k, tp=1, hidden=hidden, chunk=chunk, device=device, dtype="float32")
    rows = []
    for name in ways:
        cpu_s, wall_s = (statistics.median(column) for column in zip(*times[name], strict=True))
        size = tokens * vocab * 4
        rows.append(Row(name, shown, ms=1e3 * cpu_s, wall_ms=1e3 * wall_s, extra_bytes=extra[name], logits_bytes=size))
        rows[-1].relative = rows[-1].ms / rows[0].ms
    return rows


def copy_bandwidth() -> float:
    """Return the bytes per second of a copy on the GPU, reads and writes both counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start = clock("cuda")
        target.copy_(source)
        times.append(clock("cuda") - start)
    return 2 * source.numel() / statistics.median(times)


def check_kernels() -> dict[str, float]:
    """Return the largest deviation of the CUDA kernels from the torch path, by kind, tail and dtype.

    Raises AssertionError beyond 2e-5 (bfloat16 gradients: one unit in the last place). For tools/check_gpu.py; needs a
    GPU.
    """
    from megatron_hdpo.divergence import triton_pass

    worst: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        setting = Setting(
            tokens=64,
            vocab=50_304,
            k=64,
            tp=1,
            dtype=str(dtype).removeprefix("torch."),
            device="cuda",
            rank=0,
            group=None,
        )
        logits, ids, topk, _ = setting.tensors()
        for kind, tail in (
            ("jsd", "outside"),
            ("jsd", "bucket"),
            ("reverse_kl", "bucket"),
            ("forward_kl", "renormalise"),
        ):
            results = []
            for use in (True, False):
                suits = triton_pass.suits
                triton_pass.suits = suits if use else (lambda *_: False)  # type: ignore[assignment]
                try:
                    z = logits.clone().requires_grad_()
                    spec = DivergenceSpec(kind, tail=tail)
                    losses = logit_losses(z, ids, topk, spec=spec, temperature=0.8, vocab_size=50_257)
                    (losses.logprobs_T + losses.entropy_T + losses.divergence_T).sum().backward()  # type: ignore[operator]
                finally:
                    triton_pass.suits = suits
                results.append((losses.logprobs_T, losses.entropy_T, losses.divergence_T, z.grad))
            room = 2e-5 if dtype == torch.float32 else 2.0**-7
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want, rtol=room, atol=2e-5)
                key = f"{kind} {tail} {dtype}"
                worst[key] = max(worst.get(key, 0.0), float((got.double() - want.double()).abs().max()))
    return worst


def run_rank(rank: int, port: int, options: argparse.Namespace) -> None:
    """Run all measurements of the command line on one rank."""
    torch.set_num_threads(1)
    backend = "nccl" if options.device == "cuda" else "gloo"
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=options.tp, init_method=f"tcp://127.0.0.1:{port}")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(options.tp)
    group = dist.group.WORLD if options.tp > 1 else None
    rows, missing = [], {}
    if not rank:
        print(HEADER + ("  copy %" if options.device == "cuda" else ""), flush=True)
    for vocab in options.vocab:
        for i, k in enumerate(options.k):
            setting = Setting(
                tokens=options.tokens,
                vocab=vocab,
                k=k,
                tp=options.tp,
                dtype=options.dtype,
                device=options.device,
                rank=rank,
                group=group,
            )
            some, absent = measure(setting, options.repeats, full=options.full and i == 0, nemo_rl=options.nemo_rl)
            rows, missing = rows + some, missing | absent
            if not rank:
                print("\n".join(row.line() for row in some), flush=True)
    if options.head and options.tp == 1:
        some = measure_head(
            tokens=4096,
            vocab=32768,
            hidden=options.hidden,
            k=64,
            chunk=options.chunk,
            repeats=max(2, options.repeats // 3),
            device=options.device,
        )
        print("\n".join(row.line() for row in some), flush=True)
        rows += some
    if not rank:
        for name, why in missing.items():
            print(f"not run: {name}: {why}")
        _write(rows, missing, options)
    dist.destroy_process_group()


def _write(rows: list[Row], missing: dict[str, str], options: argparse.Namespace) -> None:
    if not options.json:
        return
    import megatron.core

    about = {
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "repeats": options.repeats,
    }
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    Path(options.json).write_text(json.dumps({**about, "not_run": missing, "rows": [vars(r) for r in rows]}, indent=1))


def _processor() -> str:
    """Return the processor's name, as Linux knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Run the measurements of the command line, with one process per rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152])
    parser.add_argument("--k", type=int, nargs="+", default=[64])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-full", dest="full", action="store_false", help="leave the full-vocabulary kinds out")
    parser.add_argument("--no-head", dest="head", action="store_false", help="leave the chunked head out")
    parser.add_argument("--hidden", type=int, default=576, help="hidden size of the head's part")
    parser.add_argument("--chunk", type=int, default=256, help="tokens per chunk of the head's part")
    parser.add_argument("--nemo-rl", type=Path, help="a checkout of NVIDIA-NeMo/RL, whose distillation joins the table")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    if options.device == "cuda":
        print("kernels against the torch path, largest deviation:", json.dumps(check_kernels(), indent=1))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    if options.tp == 1:
        run_rank(0, port, options)
    else:
        mp.spawn(run_rank, (port, options), options.tp)


if __name__ == "__main__":
    main()

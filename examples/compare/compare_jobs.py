"""Runs of the comparison: what each one is, which are complete, and running the others a few at a time."""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import _part  # noqa: F401
from compare_results import Outcome, Setting, write_results
from compare_run import run_recipe
from rich.console import Console

from megatron_hdpo.config import Recipe, load_recipe
from megatron_hdpo.config.file import recipe_changes
from megatron_hdpo.config.precision import begun_in, resolve
from megatron_hdpo.tracking.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "methods"
TEACHER = ROOT / "examples" / "compare" / "teacher.yaml"
TEACHER_SEED = 100
TIME_LIMIT_S = 1800
OF_A_WARMUP = ("seed", "model.", "data.", "warmup.", "evaluation.", "rollout.max_new_tokens")
"""Keys that a warm-up and its evaluation depend on: changes of other keys do not require a new one."""


@dataclass(frozen=True)
class Job:
    """A run: its recipe, the overrides, and the folder that it fills."""

    recipe: Path
    folder: Path
    overrides: tuple[str, ...]

    @property
    def log(self) -> Path:
        """File with the output of the run."""
        return self.folder / "console.log"

    def load(self) -> Recipe:
        """Return the recipe with its overrides."""
        common = (f"output={self.folder}", "threads_per_rank=1", "rollout.save=false")
        return load_recipe(self.recipe, [*common, *self.overrides])

    def is_complete(self) -> bool:
        """Return whether the folder holds this run with the same settings, trained to its last step."""
        recipe = self.load()
        if (dtype := begun_in(self.folder)) is not None:  # the saved recipe shows what auto became
            recipe = resolve(recipe, dtype if recipe.model.dtype == "auto" else recipe.model.dtype)
        changes = recipe_changes(self.folder / "recipe.yaml", recipe)
        if recipe.train.steps == 0:
            changes = [change for change in changes if change.startswith(OF_A_WARMUP)]
        if changes or not (self.folder / METRICS_FILE).exists():
            return False
        records = read_metrics(self.folder)
        exported = not recipe.checkpoint.export or (self.folder / "hf" / "config.json").exists()
        return bool(records) and records[-1]["step"] == recipe.train.steps and exported


def main(description: str) -> None:
    """Run all jobs of the command line and write the results."""
    arguments, console = _arguments(description), Console()
    started = time.time()
    out, seeds = arguments.out, arguments.seeds
    chosen = {name: load_recipe(RECIPES / f"{name}.yaml") for name in arguments.methods}
    teacher = _teacher(arguments) if any(r.teacher.kind == "external" for r in chosen.values()) else None
    starts = {seed: _start(arguments, seed) for seed in seeds}
    jobs = {(name, seed): _method(arguments, name, seed) for seed in seeds for name in chosen}
    failures = _run([*([teacher] if teacher else []), *starts.values()], arguments.jobs, console)
    needed = {key: [starts[key[1]], *([teacher] if chosen[key[0]].teacher.kind == "external" else [])] for key in jobs}
    possible = [job for key, job in jobs.items() if not any(before in failures for before in needed[key])]
    failures |= _run(possible, arguments.jobs, console)
    outcomes = {
        key: Outcome(job.folder, failures.get(job) or (None if job in possible else "what it starts from failed"))
        for key, job in jobs.items()
    }
    given = {("warmed up", seed): Outcome(job.folder, failures.get(job)) for seed, job in starts.items()}
    if teacher:
        given["teacher", TEACHER_SEED] = Outcome(teacher.folder, failures.get(teacher))
    steps = jobs[next(iter(jobs))].load().train.steps
    write_results(out, given, outcomes, Setting(seeds, steps, arguments.jobs, time.time() - started), console)


def _arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    parser.add_argument(
        "--methods", type=_names(every), default=every, help="recipes, separated by commas; default: all"
    )
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="steps of every method; default: those of its recipe")
    parser.add_argument("--warmup-steps", type=int, help="steps of warm-up and teacher; default: their recipes'")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    return parser.parse_args()


def _names(known: Sequence[str]):
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return names

    return parse


def _teacher(arguments: argparse.Namespace) -> Job:
    """Return the job of the external teacher: a warm-up alone."""
    model = _model(arguments.out / "teacher_model", TEACHER_SEED)
    overrides = [f"model.path={model}", f"seed={TEACHER_SEED}", *_warmup_steps(arguments)]
    return Job(TEACHER, arguments.out / "teacher", tuple(overrides))


def _start(arguments: argparse.Namespace, seed: int) -> Job:
    """Return the warm-up job that all methods of a seed start from; all recipes share its settings, so any will do."""
    model = _model(arguments.out / f"seed{seed}" / "model", seed)
    overrides = [f"model.path={model}", f"seed={seed}", "train.steps=0", *_warmup_steps(arguments)]
    return Job(RECIPES / "grpo.yaml", arguments.out / f"seed{seed}" / "start", tuple(overrides))


def _method(arguments: argparse.Namespace, name: str, seed: int) -> Job:
    folder = arguments.out / f"seed{seed}"
    overrides = [f"model.path={folder / 'start' / 'hf'}", f"seed={seed}", "warmup.kind=none"]
    overrides += ["evaluation.before=false", "checkpoint.export=false"]
    if load_recipe(RECIPES / f"{name}.yaml").teacher.kind == "external":
        overrides.append(f"teacher.path={arguments.out / 'teacher' / 'hf'}")
    if arguments.steps is not None:
        overrides.append(f"train.steps={arguments.steps}")
    return Job(RECIPES / f"{name}.yaml", folder / name, tuple(overrides))


def _warmup_steps(arguments: argparse.Namespace) -> list[str]:
    return [] if arguments.warmup_steps is None else [f"warmup.steps={arguments.warmup_steps}"]


def _model(folder: Path, seed: int) -> Path:
    if not (folder / "config.json").exists():
        make = [sys.executable, "-m", "megatron_hdpo", "make-tiny-model", folder.resolve(), "--seed", str(seed)]
        subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
    return folder


def _run(jobs: Sequence[Job], at_a_time: int, console: Console) -> dict[Job, str]:
    """Run the jobs that are not complete; return the reason of each one that failed."""
    waiting = [job for job in jobs if not job.is_complete()]
    console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are complete already")
    failures: dict[Job, str] = {}
    running: list[tuple[Job, BaseProcess, float]] = []
    while waiting or running:
        while waiting and len(running) < at_a_time:
            job = waiting.pop(0)
            running.append((job, _begin(job), time.time()))
        wait([process.sentinel for _, process, _ in running], timeout=10)
        for job, process, began in list(running):
            seconds = time.time() - began
            if process.is_alive() and seconds < TIME_LIMIT_S:
                continue
            running.remove((job, process, began))
            if reason := _end(job, process):
                failures[job] = reason
            verdict = f"FAILED: {reason}" if reason else "done"
            console.print(f"{job.folder}: {verdict} ({seconds:.0f} s, {len(waiting)} waiting)", markup=False)
    return failures


def _begin(job: Job) -> BaseProcess:
    """Start a job from its beginning in its own process."""
    if job.folder.name == "start":  # the methods of this seed were trained from the old start: delete them
        _empty(job.folder.parent, keep="model")
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    # Forked: slow imports are done already, and no thread has been started yet.
    process = multiprocessing.get_context("fork").Process(target=run_recipe, args=(job.load(), job.log))
    process.start()
    return process


def _end(job: Job, process: BaseProcess) -> str | None:
    """Return why the job failed, or None."""
    if process.is_alive():
        process.terminate()
        process.join()
        return f"not done after {TIME_LIMIT_S} s, see {job.log}"
    process.join()
    if process.exitcode == 0 and job.is_complete():
        return None
    lines = [line.strip() for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {process.exitcode}, {lines[-1] if lines else 'nothing printed'}; see {job.log}"


def _empty(folder: Path, keep: str) -> None:
    for path in folder.iterdir():
        if path.name != keep:
            shutil.rmtree(path)

"""The quickstart in two acts, on a CPU in about ten minutes: what `make quickstart` runs once the set-up is done.

Act one: a tiny model is made, warmed up, and trained by GRPO and by HDPO at the same time, on the same problems with
the same seeds. Act two: a pretrained model learns word problems with HDPO. Each part is skipped when it is complete
and goes on from its last checkpoint when it was interrupted: run the same command again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import _environment  # noqa: E402, F401
import yaml  # noqa: E402
from findings import Score, change, score, signal, verdict  # noqa: E402
from relay import INTERRUPTED, Part, PartFailed, Screen, interrupt_on_signals, run  # noqa: E402

from megatron_hdpo.tracking.metrics import METRICS_FILE, read_metrics  # noqa: E402

HERE = Path("examples/quickstart")
OUT = Path("runs/quickstart")
MODEL = Path("runs/smollm2-135m-instruct")
TINY_SIZES = ("--layers", "3", "--hidden", "64", "--ffn", "192")
BAR = 20


@dataclass(frozen=True)
class Training:
    """A run of a recipe.

    ranks: processes of torchrun; 1: without torchrun. overrides: `key.path=value`.
    """

    name: str
    recipe: Path
    output: Path
    overrides: tuple[str, ...] = ()
    ranks: int = 1

    @property
    def command(self) -> list[str | Path]:
        """Command that trains the run, or resumes it."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        start = torchrun if self.ranks > 1 else []
        return [sys.executable, *start, "-m", "megatron_hdpo", "train", self.recipe, *self.arguments]

    @property
    def arguments(self) -> list[str]:
        """Overrides of the recipe, with the output folder."""
        return [f"output={self.output}", *self.overrides]

    @property
    def is_complete(self) -> bool:
        """Whether this recipe, in its current form, was trained to its end."""
        return self._mark.is_file() and self._mark.read_text() == self._fingerprint

    def complete(self) -> None:
        """Record that the run was trained to its end."""
        self._mark.write_text(self._fingerprint)

    @property
    def settings(self) -> dict[str, Any]:
        """Recipe file as a tree, without overrides."""
        return yaml.safe_load(self.recipe.read_text(encoding="utf-8"))

    def records(self) -> list[dict[str, Any]]:
        """Return the record of each step so far."""
        return read_metrics(self.output) if (self.output / METRICS_FILE).is_file() else []

    @property
    def _mark(self) -> Path:
        return self.output / "complete.sha256"

    @property
    def _fingerprint(self) -> str:
        return hashlib.sha256("\n".join([self.recipe.read_text(), *self.arguments]).encode()).hexdigest()


def trainings() -> tuple[Training, Training, Training]:
    """Return the runs of the quickstart: GRPO and HDPO of act one, HDPO of act two."""
    sums = HERE / "sums.yaml"
    grpo = Training("GRPO", sums, OUT / "sums-grpo", ("objective={name: grpo}", "teacher={kind: policy}"))
    hdpo = Training("HDPO", sums, OUT / "sums-hdpo")
    return grpo, hdpo, Training("HDPO on words", HERE / "hdpo.yaml", OUT / "words", ranks=2)


def main() -> None:
    """Run both acts, or what is left of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    grpo, hdpo, words = trainings()
    interrupt_on_signals()
    screen, began = Screen(), time.monotonic()
    try:
        act_one(screen, grpo, hdpo)
        act_two(screen, words)
    except PartFailed as failure:
        sys.exit(f"\n{failure}\nOnce the cause is fixed, the same command goes on from here.")
    except KeyboardInterrupt:
        screen.line("interrupted: run the same command to go on")
        sys.exit(INTERRUPTED)
    screen.line("\n".join(["", "What was seen", *(f"  {text}" for text in summary(grpo, hdpo, words))]))
    screen.line("\n".join(next_steps(grpo, hdpo, words)))
    screen.line(f"\nquickstart: {time.monotonic() - began:.0f} s in this call, the set-up not counted")


def act_one(screen: Screen, grpo: Training, hdpo: Training) -> None:
    """Make the tiny model, train it with both methods in parallel, and print the verdict."""
    screen.line("\nAct one: a tiny model, GRPO and HDPO on the same cliffs with the same seeds")
    settings = hdpo.settings
    make_tiny_model(screen, Path(settings["model"]["path"]))
    curve = Curve(screen, grpo, hdpo, settings["evaluation"]["samples"])
    train(screen, grpo, hdpo, on_tick=curve.show_new)
    curve.show_new()
    figure = OUT / "sums.png"
    draw = [sys.executable, HERE / "sums_figure.py", grpo.output, hdpo.output, figure]
    run(screen, Part("figure", draw, OUT / "logs" / "figure.log"))
    screen.line(f"the curves with their intervals: {figure}")
    for text in act_one_verdicts(grpo, hdpo):
        screen.line(text)


def act_two(screen: Screen, words: Training) -> None:
    """Fetch the pretrained model, train it on word problems, and show its answers before and after."""
    screen.line("\nAct two: SmolLM2-135M-Instruct learns word problems with HDPO, on two ranks")
    if (MODEL / "model.safetensors").is_file():
        screen.line(f"{MODEL} is there already")
    else:
        fetch = [sys.executable, HERE / "fetch_model.py", MODEL]
        seconds = run(screen, Part("model", fetch, OUT / "logs" / "fetch.log", _is_of_fetching))
        screen.line(f"the pretrained model is there after {seconds:.0f} s")
    train(screen, words)
    show_answers(screen, words)


def make_tiny_model(screen: Screen, folder: Path) -> None:
    """Write the tiny model into the folder, completely or not at all."""
    if folder.is_dir():
        screen.line(f"{folder} is there already")
        return
    partial = folder.with_name(folder.name + ".partial")
    make = [sys.executable, "-m", "megatron_hdpo", "make-tiny-model", partial, *TINY_SIZES]
    seconds = run(screen, Part("making the tiny model", make, OUT / "logs" / "make.log", lambda line: False))
    partial.rename(folder)
    screen.line(f"made {folder} in {seconds:.0f} s")


def train(screen: Screen, *runs: Training, on_tick: Callable[[], None] = lambda: None) -> None:
    """Train the runs that are not complete, in parallel."""
    left = [one for one in runs if not one.is_complete]
    for one in runs:
        state = "is complete" if one not in left else "goes on" if one.records() else "starts"
        screen.line(f"{one.name} {state}: {one.recipe}, output in {one.output}")
    if not left:
        return
    # One thread per rank: two ranks with a thread per core each would compete for the cores.
    threads = {"OMP_NUM_THREADS": "1"}
    alone = len(runs) == 1
    parts = [
        Part(one.name, one.command, one.output / "console.log", matters if alone else _is_warning, threads)
        for one in left
    ]
    seconds = run(screen, *parts, on_tick=on_tick)
    for one in left:
        one.complete()
    screen.line(f"{' and '.join(one.name for one in left)}: done in {seconds:.0f} s")


def matters(line: str) -> bool:
    """Return whether a line of a run's console is more than progress; progress lines begin with the time of day."""
    return bool(line) and not line.startswith("[")


def _is_warning(line: str) -> bool:
    return line.startswith("warning:")


def _is_of_fetching(line: str) -> bool:
    return line.startswith(("downloading", "downloaded", "converting", "wrote"))


class Curve:
    """Curve of act one as text: a row for each evaluation that both runs have done."""

    def __init__(self, screen: Screen, grpo: Training, hdpo: Training, samples: int) -> None:
        self._screen, self._runs, self._samples = screen, (grpo, hdpo), samples
        self._shown = 0

    def show_new(self) -> None:
        """Print the rows that have not been printed."""
        scores = [self._scores(one) for one in self._runs]
        both = [step for step in scores[0] if step in scores[1]]
        for step in both[self._shown :]:
            if not self._shown:
                title = f"held-out sums of 5 and 6 digits that one of {self._samples} samples solves"
                self._screen.line(f"\n{title}\nstep  {'GRPO':{BAR + 22}}HDPO")
            self._shown += 1
            cells = "".join(f"{bar(of[step]):{BAR + 22}}" for of in scores)
            self._screen.line(f"{step:>4}  {cells}".rstrip())

    def _scores(self, one: Training) -> dict[int, Score]:
        metric = f"pass@{self._samples}"
        found = {record["step"]: score(record, "cliffs", metric, self._samples) for record in one.records()}
        return {step: value for step, value in found.items() if value is not None}


def bar(value: Score) -> str:
    """Return a share as a bar of text, with its numbers."""
    full = round(BAR * value.solved.value)
    return "#" * full + "." * (BAR - full) + f" {value.text}"


def show_answers(screen: Screen, words: Training) -> None:
    """Print the answers of the pretrained and the trained model to the same held-out problem."""
    file = words.output / "answers.json"
    trained = words.output / "hf"
    if not file.is_file() or file.stat().st_mtime < (trained / "config.json").stat().st_mtime:
        ask = [sys.executable, HERE / "answers.py", words.recipe, file, f"before={MODEL}", f"after={trained}"]
        part = Part(
            "asking both models", ask, OUT / "logs" / "answers.log", lambda line: False, {"OMP_NUM_THREADS": "2"}
        )
        run(screen, part)
    found = json.loads(file.read_text(encoding="utf-8"))
    screen.line(f"\nA held-out problem: {found['question']}\nThe right answer: {found['answer']}")
    for name, said in found["checkpoints"].items():
        text = said["text"].strip().replace("\n", "\n    ")
        screen.line(f"  {name} ({'right' if said['right'] else 'wrong'}):\n    {text}")


def act_one_verdicts(grpo: Training, hdpo: Training) -> list[str]:
    """Return a sentence on the cliffs and one on the taught sums, from the last evaluation of both runs."""
    samples = hdpo.settings["evaluation"]["samples"]
    sets = {"cliffs": "Held-out sums of 5 and 6 digits", "taught": "Held-out sums of 3 digits, which were taught"}
    texts = []
    for name, what in sets.items():
        ours, theirs = (score(one.records()[-1], name, f"pass@{samples}", samples) for one in (hdpo, grpo))
        lost = f"{what}: no verdict, because the last step of a run has no evaluation."
        texts.append(lost if ours is None or theirs is None else verdict(ours, theirs, what))
    return texts


def summary(grpo: Training, hdpo: Training, words: Training) -> list[str]:
    """Return three sentences: the verdict of act one, the change in act two, and where its signal came from."""
    settings, records = words.settings, words.records()
    samples, name = settings["evaluation"]["samples"], settings["data"]["evaluation"][0]["name"]
    before, after = (score(record, name, f"pass@{samples}", samples) for record in (records[0], records[-1]))
    what = f"Act two, held-out word problems that one of {samples} samples solves"
    lost = f"{what}: no verdict on the change, because an evaluation is missing."
    return [
        f"Act one. {act_one_verdicts(grpo, hdpo)[0]}",
        lost if before is None or after is None else change(before, after, what),
        f"Act two: {signal(records, settings['rollout']['prompts_per_step'])}",
    ]


def next_steps(grpo: Training, hdpo: Training, words: Training) -> list[str]:
    """Return lines with the reports and suggestions for what to try next."""
    reports = [f"  {one.output / 'report.html'}" for one in (grpo, hdpo, words)]
    return [
        "",
        "Reports, to open in a browser",
        *reports,
        f"Trained model, which transformers loads: {words.output / 'hf'}",
        "What to try next: more steps in act two (raise train.steps in examples/quickstart/hdpo.yaml and run",
        "  make quickstart again: it goes on from its checkpoint), another method of examples/methods, or a model and",
        "  problems of your own (README.md, 'The first recipe to change').",
    ]


if __name__ == "__main__":
    main()

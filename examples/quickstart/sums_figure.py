"""Draw the curves of act one: sums that GRPO and HDPO solve on the same held-out problems, with 95 % intervals.

python examples/quickstart/sums_figure.py GRPO_RUN HDPO_RUN OUT.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import _environment  # noqa: F401
from findings import score
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_hdpo.tracking.metrics import read_metrics

SAMPLES = 8
PANELS = {"cliffs": "Sums of 5 and 6 digits (cliffs)", "taught": "Sums of 3 digits (taught)"}


def main() -> None:
    """Read two run folders and write the PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("grpo", "hdpo", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    figure = Figure(figsize=(9, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        for label, run in (("GRPO", arguments.grpo), ("HDPO", arguments.hdpo)):
            scores = {r["step"]: score(r, name, f"pass@{SAMPLES}", SAMPLES) for r in read_metrics(run)}
            found = [(step, s.solved) for step, s in scores.items() if s is not None]
            steps = [step for step, _ in found]
            (line,) = axes.plot(steps, [s.value for _, s in found], marker="o", markersize=3.5, label=label)
            low, high = [s.low for _, s in found], [s.high for _, s in found]
            axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(f"solved by one of {SAMPLES} samples")
    panels[0].set_ylim(-0.02, 1.02)
    panels[0].legend()
    partial = arguments.out.with_suffix(".partial.png")
    figure.savefig(partial)
    partial.replace(arguments.out)


if __name__ == "__main__":
    main()

"""Compare all methods on the same tiny model, task and seeds: one table and one figure.

    make compare
    python examples/compare/compare.py --methods grpo,hdpo --seeds 0 --steps 20

For each seed a model is made and warmed up; every recipe of examples/methods then trains it from the same weights, with
the same problems, samples and evaluation. Methods with an external teacher share one, which is trained first. Each run
has its own process; `--jobs` of them run at a time. A second call skips complete runs and repeats those that failed or
that an earlier call made with other settings. A run that fails is reported as failed, never as a number.
"""

if __name__ == "__main__":
    # Processes that score and save import this file again: it must import nothing heavy at the top.
    from compare_jobs import main

    main(__doc__ or "")

"""Every method on the same tiny model, task and seeds: one table and one figure.

    make compare
    python examples/compare/compare.py --methods grpo,hdpo --seeds 0 --steps 20

For each seed a model is made and warmed up; every recipe of examples/methods then trains it from the same weights, with
the same problems, samples and evaluation. Methods with an external teacher share one, which is trained first. A run is
a process of its own, `--jobs` of them at a time. Called again, what is complete is not run again; what failed is, and
what an earlier call ran with other settings. A run that fails is reported as failed, never as a number.
"""

if __name__ == "__main__":
    # Processes that score and save import this file anew: nothing heavy may stand above.
    from compare_jobs import main

    main(__doc__ or "")

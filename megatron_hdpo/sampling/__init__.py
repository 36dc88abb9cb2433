"""Sampling: what is sampled in a step, how failures are handled, and how rollouts are saved.

May import data, parallel, rewards, rollout and types; only training, evaluation and tools import it. Start reading at
`coordinator.py` (all ranks), then `sampler.py` (one rank). What a rank knows of the groups of others is in
`step_rollouts.py`; `delivery.py` takes groups to the ranks that learn from them, `saver.py` to the disk.
"""

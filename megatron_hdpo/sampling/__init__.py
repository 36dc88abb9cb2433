"""Sampling: what is sampled in a step, how failures are handled, and how rollouts are saved.

May import data, parallel, rewards, rollout and types; only training, evaluation and tools import it. Start reading at
`coordinator.py` (all ranks), then `sampler.py` (one rank).
"""

"""Data types and protocols that the rooms exchange: problems, rollouts, scorings, examples, loss settings, errors.

Imports nothing of megatron_hdpo but its own files; every room may import it.
Start with rollouts.py (what sampling produces), then learning.py (what an objective gets and returns).
"""

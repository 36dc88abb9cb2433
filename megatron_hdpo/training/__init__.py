"""Training: start-up, warm-up, the training loop and the learner.

The top room of the package: it may import every other room except `cli.py`, and only `cli.py` imports it. Start reading
at `loop.py` (the loop); then `run.py` (what a run holds), `rollout_phase.py` (rollouts of a step) and `learner.py`
(scores, examples, update).
"""

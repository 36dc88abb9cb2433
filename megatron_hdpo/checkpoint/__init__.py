"""Checkpoints of a run: save and resume of model, optimizer, schedule, and the state of objective and teacher.

May import `parallel`, `model` and `weights`. Start with `store.py`; `optimizer_state.py` holds the optimizer's part,
tied to its layout or fit for any.
"""

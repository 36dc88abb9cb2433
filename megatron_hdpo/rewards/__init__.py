"""Rewards: extraction of final answers, mathematical and exact comparison, worker processes that can be killed.

May import `types` only; no torch, since workers import this room. Start reading at `pool.py`; `extraction.py` has the
rule for final answers, `functions.py` the parts of a reward, `service.py` the client of a reward service.
"""

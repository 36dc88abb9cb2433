"""Evaluation on held-out problems: pass@k with intervals, mean reward, greedy accuracy.

May import `types` and `sampling`. Start reading at `evaluate.py`; `passk.py` has the statistics, `parts.py` levels and
sources.
"""

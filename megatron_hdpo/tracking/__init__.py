"""Records of a run: metrics, timing, performance, logs, traces, and the report made of them.

May import `types`, `parallel`, `divergence`, `costs` and `model`. Start reading at `tracker.py`; `names.py` lists the
standard metrics.
"""

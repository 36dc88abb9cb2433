"""Process groups, devices and seeds of a run, and the stand-ins that let Megatron-Core run on a CPU.

Imports `types` only. Start with `context.py` (groups and the exchange of Python objects), then `meetings.py` (how ranks
wait for each other's long work) and `layout.py` (the parallel section of a recipe and which models it can split);
`cpu.py` and `gloo.py` are for CPU runs only.
"""

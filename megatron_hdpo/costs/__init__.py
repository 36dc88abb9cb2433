"""Exact arithmetic of a training step: FLOPs, parameters, memory, collectives; used by trainer, tracking and planner.

May import types, parallel.layout, model.architecture and divergence.shard (one constant); no torch.distributed.
Start with layout.py (ranks per dimension) and workload.py (the work of a step), then memory.py or flops.py.
"""

"""The model in Megatron-Core: built from a Hugging Face config, packed micro-batches, scores, loss, optimizer step.

May import `types`, `parallel` and `divergence`, and the surrogate of `objectives`. Start with `policy.py` (`score` and
`update`), then `micro_batch.py` (what a step runs on) and `loss.py`; `build.py` makes the network.
"""

"""Rollout engines: the embedded engine on `transformers`, and stock SGLang servers (`sglang/`).

An engine samples requests with the weights it was last given; it knows no objective and no reward. May import model,
parallel, weights and types, and of rewards the workers that can be killed. Start reading at `engine.py` (the protocol),
then `build.py` (from a recipe to an engine).
"""

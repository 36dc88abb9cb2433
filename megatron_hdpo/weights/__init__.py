"""Weights between Megatron and Hugging Face: names and shards, loading, streaming to engines, conversion and its check.

May import `parallel` and `model`. Start with `tables.py` (which Hugging Face tensors make a Megatron parameter) and
`mapping.py` (how ranks split it); `load.py` reads these pieces and `stream.py` puts them together.
"""

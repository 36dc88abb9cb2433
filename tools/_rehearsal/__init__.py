"""One rank of a training step on a CUDA device that has memory and no arithmetic: parts of `tools/rehearse.py`."""

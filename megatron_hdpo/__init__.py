"""HDPO and its family of on-policy self-distillation methods on Megatron-Core."""

__version__ = "0.1.0"

"""Aligns language models on a cluster: megatron-core trains and vLLM generates, on the same ranks."""

__version__ = "0.1.0"

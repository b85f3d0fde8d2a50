"""Alignment of language models on a cluster: megatron-core trains, vLLM samples, on the same ranks."""

__version__ = "0.1.0"

"""Reinforcement learning with verifiable rewards at Megatron scale; its subject is LENS (arXiv 2601.21244).

Importing this package is light on purpose: torch, megatron, transformers and sglang are imported by the modules that
need them.
"""

__version__ = "0.1.0"

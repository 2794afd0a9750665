"""Checkpoint tools: HF -> Megatron, Megatron -> HF, verify, inspect."""

"""Checkpoint tools: HF -> Megatron, Megatron -> HF, verify, inspect, average, prune. No GPU, no process group, no Megatron.

pieces.py          which rows of HF tensors make up a Megatron tensor, and back
torch_records.py   one tensor as torch.save writes it, without holding it
index_writer.py    .metadata of Megatron's distributed checkpoints (read in lens_megatron/mcore/checkpoint_index.py)
sources.py         rows of tensors out of either format
streaming.py       rows into files, by several workers, resumable
hf_to_megatron.py, megatron_to_hf.py, combine.py (average, prune), inspection.py
forward.py, verify.py   two checkpoints compared: bits, and hidden states layer by layer
"""

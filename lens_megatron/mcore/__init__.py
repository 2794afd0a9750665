"""Everything that touches Megatron-Core, and nothing else does.

layout.py      which ranks hold what; refused with the reason before anything is allocated
runtime.py     process groups, devices, and what Megatron-Core needs to run without CUDA
attention.py, rotary.py, layer_spec.py, model.py, head*.py   the sharded model, down to token log-probs and entropies
hf_names.py, hf_files.py, hf_bridge.py           HF weights in and out, slice by slice
packing.py, batch.py                             ragged sequences into equal micro-batches for every rank
pipeline.py, logprobs.py, noise.py               forward-only passes over Megatron's schedules
optimizer.py, step.py                            training steps
"""

import warnings

# Said at every import by Megatron-Core without Transformer Engine; `lens-megatron doctor` says it once, with what to do.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*deprecated", category=FutureWarning)
# The CPU mode looks at every attribute through torch's dispatch, which warns where Megatron-Core asks a view for .grad.
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")

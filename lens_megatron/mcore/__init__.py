"""Everything that touches Megatron-Core, and nothing else does.

layout.py, settings.py   which ranks hold what, refused with the reason before anything is allocated; memory and optimizer
runtime.py               process groups, devices, and what Megatron-Core needs to run without CUDA
rendezvous.py, agreement.py, watch.py            rank 0 works while others wait; ranks that fail together; signs of life
attention.py, rotary.py, norm.py, made_again.py, layer_spec.py, model.py   the sharded model; activations made again
head.py, head_chunked.py, head_triton.py, head_kernels.py   from its hidden states to token log-probs and entropies
hf_names.py, hf_slices.py, hf_bridge.py          HF weights in and out, slice by slice; one table for both directions
hf_index.py, hf_files.py, hf_companions.py, hf_copies.py   HF folders: looked at, read and written; copies while training
packing.py, batch.py, context.py                 ragged sequences into equal micro-batches for every rank
pipeline.py, logprobs.py, noise.py, routing.py   passes over Megatron's schedules; experts replayed
embedding_gradients.py                           what each prompt token's embedding weighs
checksums.py                                     of weights and optimizer, whatever the layout
optimizer.py, moments.py, host_moments.py, step.py   training steps; Adam's moments, on the host too
offload.py, pinning.py                           off the device and back, for an engine that takes turns; pinned host memory
checkpoint.py, checkpoint_optimizer.py, checkpoint_writer.py, checkpoint_reader.py, checkpoint_run.py   saved and loaded
                                                 in any layout
checkpoint_index.py, safe_pickle.py, stored_dtypes.py   what is in a checkpoint, read without running anything of it
"""

import warnings

# Said at every import by Megatron-Core without Transformer Engine; `lens-megatron doctor` says it once, with what to do.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*deprecated", category=FutureWarning)
# Megatron-Core's checkpoints are made of them; the CPU mode looks at their class, and the warning names our line.
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
# The CPU mode looks at every attribute through torch's dispatch, which warns where Megatron-Core asks a view for .grad.
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")

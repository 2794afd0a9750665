"""A CUDA device that holds no data and computes nothing. GPU code runs on it, and its shapes and devices are checked.

device.py   the device: tensors with shape, type and place only; collectives that return at once; any rank of any world
fused.py    operations that CUDA runs as one kernel and a CPU build of torch as many, as one
trace.py    what ran: kernels, their bytes and FLOPs, the memory that was held at once, and every wait of the host
"""

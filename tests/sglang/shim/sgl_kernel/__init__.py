"""SGLang's CUDA kernels, as a stand-in. `scalar_type` stays absent: sglang has its own way without it."""

from _stand_in import Submodules, stand_in

__getattr__ = stand_in(__name__)
Submodules(__name__, absent=("scalar_type",))

# SGLang's checksum of its weights waits for the GPU first, also where there is none
import torch  # noqa: E402

if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda *_, **__: None

"""What other ranks would have said: shapes between pipeline stages, and how many tokens each expert is sent."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch


def pipeline(shapes: Sequence[tuple[int, ...]]) -> None:
    """Shapes of the micro-batches' activations, and of their gradients, in the order in which both arrive."""
    from megatron.core.pipeline_parallel import p2p_communication

    forward, backward = cycle(shapes), cycle(shapes)

    def arriving(self: Any, send_next: Any, send_previous: Any, receive_previous: bool, receive_next: bool) -> Any:
        return (
            torch.Size(next(forward)) if receive_previous else None,
            torch.Size(next(backward)) if receive_next else None,
        )

    p2p_communication.P2PCommunicator._communicate_shapes = arriving
    torch.distributed.batch_isend_irecv = lambda p2p_op_list: []


def experts() -> None:
    """Every expert is sent as many tokens as every other."""
    sent_on = 0
    from megatron.core.transformer.moe import token_dispatcher
    from torch._subclasses import fake_impls

    def counted(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if point != self.cuda_dtoh_point:
            return tokens_per_expert
        nonlocal sent_on
        sent_on = copies = self.routing_map.size(0) * self.config.moe_router_topk
        local, ranks = self.num_local_experts, self.ep_size * self.tp_size
        if ranks > 1:
            self.input_splits = self.output_splits = _evenly(copies, self.ep_size)
            self.output_splits_tp = np.full(self.tp_size, copies)
        self.num_out_tokens = copies
        sent = np.stack([_evenly(part, local) for part in _evenly(copies * self.tp_size, ranks)])
        if local > 1:
            self.num_global_tokens_per_local_expert = sent
            order = np.arange(ranks * local)
            self.sort_input_by_local_experts = order.reshape(-1, local).T.ravel()
            self.restore_output_by_local_experts = order.reshape(local, -1).T.ravel()
        return sent.sum(0)

    token_dispatcher.MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = counted
    # which copies: only their number matters here
    fake_impls.op_implementations_dict[torch.ops.aten.masked_select.default] = lambda mode, function, tensor, mask: (
        tensor.new_empty(sent_on)
    )


def _evenly(count: int, parts: int) -> np.ndarray:
    """Whole numbers; of numpy, since a tensor made on the fake device has none."""
    return np.diff(np.arange(parts + 1) * count // parts)

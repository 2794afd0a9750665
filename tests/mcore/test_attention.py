"""The pieces that context-parallel attention is cut into, against attention over the whole pack. On CUDA each piece goes to
flash attention, whose causal mask is aligned to the last query and the last key; here SDPA stands for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lens_megatron.mcore.attention import _one_by_one, seen_by_chunks
from lens_megatron.mcore.packing import local_positions

LENGTHS = [16, 8, 40]


def test_every_rank_s_pieces_give_its_part_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    total = sum(LENGTHS)
    q_TND = torch.randn(total, 4, 8, generator=generator)
    k_TGD, v_TGD = (torch.randn(total, 2, 8, generator=generator) for _ in range(2))
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(total)
    visible_TT = (owner[:, None] == owner[None, :]) & (place[:, None] >= place[None, :])
    whole_TND = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q_TND, k_TGD, v_TGD)), attn_mask=visible_TT, scale=0.3, enable_gqa=True
    )[0].transpose(0, 1)
    for ranks in (2, 4):
        for rank in range(ranks):
            mine = local_positions(LENGTHS, ranks, rank)
            seen, queries = seen_by_chunks(LENGTHS, ranks, rank)
            keys = torch.cat(seen)
            # no key that a mask would only hide, but for the triangle in each chunk
            assert len(keys) == total * (2 * ranks + 1) // (2 * ranks)
            found = _one_by_one(q_TND[mine], k_TGD[keys], v_TGD[keys], queries, [len(s) for s in seen], 0.3)
            torch.testing.assert_close(found, whole_TND[mine])

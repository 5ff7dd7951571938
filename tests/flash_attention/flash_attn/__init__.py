"""Stands in for flash-attn 2 where there is no GPU: the two functions that Megatron's dynamic engine calls, in torch.

Keys and values lie in pages: [pages, page size, heads, head size]; block_table [sequences, pages of each].
"""

from itertools import pairwise

import torch

__version__ = "2.7.4"


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False, block_table=None
):
    """q [tokens of all sequences, heads, head size]; the sequences begin at cu_seqlens_q -> the same shape."""
    out, starts = torch.zeros_like(q), cu_seqlens_q.tolist()
    lengths = cu_seqlens_k.diff().tolist()
    for index, (start, stop) in enumerate(pairwise(starts)):
        if stop > start:
            pages = block_table[index]
            out[start:stop] = _attend(q[start:stop], k[pages], v[pages], lengths[index], softmax_scale)
    return out


def flash_attn_with_kvcache(
    q, k_cache, v_cache, cache_seqlens=None, softmax_scale=None, causal=False, block_table=None, num_splits=0
):
    """q [sequences, tokens of each, heads, head size] -> the same shape."""
    out = torch.zeros_like(q)
    for index, length in enumerate(cache_seqlens.tolist()):
        if length:
            pages = block_table[index]
            out[index] = _attend(q[index], k_cache[pages], v_cache[pages], length, softmax_scale)
    return out


def _attend(q, k, v, length, scale):
    """Causal attention of the last tokens of a sequence of `length`, whose pages come in order."""
    k, v = (x.flatten(0, 1)[:length].repeat_interleave(q.shape[1] // x.shape[2], dim=1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1).float() @ k.transpose(1, 2).float() * (scale or q.shape[-1] ** -0.5)
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(length - q.shape[0] + 1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.float()).transpose(0, 1).to(q.dtype)

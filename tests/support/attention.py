"""Metadata of packed rows, made by hand."""

import torch

from unmask.attention import AttentionMetadata


def packed(lengths, block_length, *, views=1, rows=1, clean=True, padding=0):
    """Rows of packed documents: noisy copies, then the clean one, then padding."""
    position = torch.cat([torch.arange(n) for n in lengths])
    document = torch.cat([torch.full((n,), number) for number, n in enumerate(lengths)])
    copies = [*range(1, views + 1), *([0] if clean else [])]

    def laid(column, filler=0):
        whole = torch.cat([column] * len(copies) + [torch.full((padding,), filler)])
        return whole.expand(rows, -1).contiguous()

    view = torch.cat(
        [torch.full_like(position, copy) for copy in copies] + [torch.zeros(padding, dtype=torch.int64)]
    )
    return AttentionMetadata(
        laid(position), laid(document, -1), laid(position // block_length), view.expand(rows, -1).contiguous()
    )

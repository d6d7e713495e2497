"""The attention map as a directed graph: tokens vote for tokens. Zero-TPrune's ranking (Wang, Dedhia, Jha, CVPR 2024).

Shapes: B batch, H heads, N tokens, P prefix tokens. `attn` [B, H, N, N] holds softmax rows: row j says for whom token j votes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def initial_signal(like: Tensor, boost_cls: bool, alive: Tensor | None = None) -> Tensor:
    """Votes before the first round (eq. 1): all alike, or the class token sqrt(N) times as many; sums to 1.

    Args:
        like: attention [B, H, N, N], for size, dtype and device.
        boost_cls: whether token 0 starts with sqrt(N) votes.
        alive: [B, N] bool, tokens that take part; `None` = all.

    Returns:
        [B, 1, N].
    """
    batch, _, n, _ = like.shape
    signal = like.new_ones(batch, 1, n)
    nodes: Tensor | float = n
    if alive is not None:
        signal = signal * alive[:, None]
        nodes = signal.sum(-1)
    if boost_cls:
        boost = torch.zeros_like(signal)
        boost[..., 0] = nodes**0.5 - 1
        signal = signal + boost
    return signal / signal.sum(-1, keepdim=True)


def weighted_page_rank(attn: Tensor, signal: Tensor, iters: int, alive: Tensor | None = None, damping: float = 0.0) -> Tensor:
    """Repeated votes, s <- s A, head by head (eq. 2).

    With `alive`, votes for other tokens are struck out and every row is normalised again, as if the graph had been cut down to
    the survivors; no smaller matrix is built.

    Args:
        attn: [B, H, N, N].
        signal: [B, 1 or H, N], sums to 1, zero outside `alive`.
        iters: number of votes, fixed in advance.
        alive: [B, N] bool or `None`.
        damping: share of every new signal that is spread evenly (0 in the paper).

    Returns:
        [B, H, N], sums to 1 (less where a row has nothing left), zero outside `alive`.
    """
    batch, heads, n, _ = attn.shape
    graphs = attn.flatten(0, 1)  # [B H, N, N]: heads and images alike, so that a round of votes is two operations
    signal = signal.expand(batch, heads, n).reshape(-1, 1, n)
    mask = weight = None
    evenly: Tensor | float = 1 / n
    if alive is not None:
        mask = alive[:, None].to(attn.dtype)  # [B, 1, N]
        left = (attn @ mask[..., None]).squeeze(-1)  # of each row
        # A token that saw dead ones only has no vote, and neither have dead ones, whatever they were given.
        weight = (mask / left.clamp_min(torch.finfo(attn.dtype).tiny)).view(-1, 1, n)
        if damping:
            evenly = (mask / mask.sum(-1, keepdim=True)).expand(batch, heads, n).reshape(-1, 1, n)
    for _ in range(iters):
        signal = torch.bmm(signal if weight is None else signal * weight, graphs)
        if damping:
            signal = signal * (1 - damping) + damping * evenly
    signal = signal.view(batch, heads, n)
    return signal if mask is None else signal * mask


def head_variance(signal: Tensor, num_prefix: int, alive: Tensor | None = None) -> Tensor:
    """Variance over the patches of each head's signal, scaled to mean 1 (eq. 3): [B, H, N] -> [B, H].

    The paper does not state the scale of its bounds [0.01, 0.7]; mean 1 is the simple one where both can bind.
    """
    patches = signal[..., num_prefix:]
    if alive is None:
        return (patches / patches.mean(-1, keepdim=True) - 1).square().mean(-1)
    weight = alive[:, None, num_prefix:].to(signal.dtype)  # the signal is zero where this is
    count = weight.sum(-1)
    mean = (patches.sum(-1) / count)[..., None]
    return ((patches / mean - 1).square() * weight).sum(-1) / count


def head_root_mean_square(signal: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Root of the mean over the chosen heads of the squared signal (eq. 4); all heads where none is chosen.

    Args:
        signal: [B, H, N].
        chosen: [B, H] bool, or `None` for all.

    Returns:
        [B, N].
    """
    if chosen is None:
        return signal.square().mean(1).sqrt()
    chosen = chosen | ~chosen.any(-1, keepdim=True)
    weight = chosen.to(signal.dtype)[..., None]  # [B, H, 1]
    return ((signal.square() * weight).sum(1) / weight.sum(1)).sqrt()


def importance(
    attn: Tensor,
    iters: int,
    num_prefix: int,
    boost_cls: bool = True,
    head_filter: tuple[float, float] | None = (0.01, 0.7),
    alive: Tensor | None = None,
) -> Tensor:
    """Importance of every token (eqs. 1 to 4): votes, head filter, aggregation over heads.

    Args:
        attn: [B, H, N, N], in at least fp32.
        iters: votes.
        num_prefix: P.
        boost_cls: start of the class token (see `initial_signal`).
        head_filter: bounds on `head_variance` outside which a head is ignored; `None` = keep all.
        alive: [B, N] bool, the graph's nodes; `None` = all.

    Returns:
        [B, N], zero outside `alive`.
    """
    signal = weighted_page_rank(attn, initial_signal(attn, boost_cls, alive), iters, alive)
    chosen = None
    if head_filter is not None:
        variance = head_variance(signal, num_prefix, alive)
        chosen = (variance >= head_filter[0]) & (variance <= head_filter[1])
    return head_root_mean_square(signal, chosen)

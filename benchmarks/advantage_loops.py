"""What prime_advantage is measured against: the same RLOO advantages in Python loops, as trainers write them.

Both take packed tensors with the K rows of a group next to each other, and return the whitened advantages (T,).
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def padded(prm: Tensor, ref: Tensor, outcome: Tensor, cu_seqlens: Tensor, k: int, gamma: float = 1.0) -> Tensor:
    """As the published code is built: padded (R, L) tensors, a loop over rows, one over groups, one over positions."""
    lengths = cu_seqlens.diff().tolist()
    prm, ref = (pad_sequence(x.split(lengths), batch_first=True) for x in (prm, ref))
    rows, longest = prm.shape
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    process, verified = torch.zeros(rows, longest), torch.zeros(rows, longest)
    for i, length in enumerate(lengths):
        process[i, :length] = prm[i, :length] - ref[i, :length]
        verified[i, length - 1] = outcome[i]
    process = process / (process.flip(1).cumsum(1).flip(1).abs().max() + 1e-6)
    last = torch.zeros_like(mask)
    last[torch.arange(rows), torch.tensor(lengths) - 1] = True
    total = torch.zeros(rows, longest)
    for reward, here, rate in ((process, mask, gamma), (verified, last, 1.0)):
        for start in range(0, rows, k):
            group = slice(start, start + k)
            means = torch.stack([reward[i][here[i]].mean() for i in range(start, start + k)])
            reward[group][here[group]] = reward[group][here[group]] * (k / (k - 1)) - means.sum() / (k - 1)
        running = torch.zeros(rows)
        for t in reversed(range(longest)):
            running = reward[:, t] + rate * running
            total[:, t] += running
    result = total[mask]
    return (result - result.mean()) / (result.var() + 1e-8).sqrt()


def tokens(prm: Tensor, ref: Tensor, outcome: Tensor, cu_seqlens: Tensor, k: int, gamma: float = 1.0) -> Tensor:
    """Row by row and token by token on tensor elements."""
    offsets = cu_seqlens.tolist()
    rows = len(outcome)
    reward, result = torch.zeros_like(prm), torch.zeros_like(prm)
    largest, means = 0.0, [0.0] * rows
    for i in range(rows):
        running = 0.0
        for t in reversed(range(offsets[i], offsets[i + 1])):
            reward[t] = prm[t] - ref[t]
            running += reward[t].item()
            largest = max(largest, abs(running))
        means[i] = running / (offsets[i + 1] - offsets[i])
    unit = largest + 1e-6
    for i in range(rows):
        peers = range(i - i % k, i - i % k + k)
        baseline = sum(means[j] for j in peers) / unit / (k - 1)
        bonus = outcome[i].item() * k / (k - 1) - sum(outcome[j].item() for j in peers) / (k - 1)
        running = 0.0
        for t in reversed(range(offsets[i], offsets[i + 1])):
            running = reward[t].item() / unit * k / (k - 1) - baseline + gamma * running
            result[t] = running + bonus
    return (result - result.mean()) / (result.var() + 1e-8).sqrt()

"""Choosing one of n samples: by an implicit PRM, by majority vote; and what that is worth in expectation.

A function that takes `solved` (P, N) bool, N samples of each of P problems, returns (P,): the chance that the choice
among n of the N samples, drawn without replacement, is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, combinations

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import prime_kernels
from prime_fast.data.models import source
from prime_fast.engine import packing
from prime_fast.engine.model import PackedLM
from prime_fast.progress import progress

MICRO_TOKENS = 16384
MAX_SUBSETS = 256  # of the samples that vote; if there are more, so many random ones stand for all


def implicit_rewards(
    prm: str,
    reference: str,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    beta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """(R,) float64 beta * Q of each row, Q the summed log-ratio of PRM to reference; one model in memory at a time."""
    prm_logprob, ref_logprob = (
        response_logprobs(model, prompts, responses, dtype=dtype, device=device) for model in (prm, reference)
    )
    ratios = (prm_logprob - ref_logprob).double().split([len(response) for response in responses])
    return beta * torch.stack([ratio.sum() for ratio in ratios])


@torch.inference_mode()
def response_logprobs(
    model: str, prompts: Sequence[Tensor], responses: Sequence[Tensor], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(T,) float32 log-probs, at temperature 1, of all response tokens, row after row, under a checkpoint."""
    with progress(f"loading {model}", at_once=True):
        lm = AutoModelForCausalLM.from_pretrained(**source(model), use_safetensors=True, dtype=dtype)
        lm = PackedLM(lm.to(device)).eval()
    offsets = [0, *accumulate(map(len, responses))]
    lengths = [len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses, strict=True)]
    flat = torch.zeros(offsets[-1])
    plan = packing.plan(lengths, max(MICRO_TOKENS, *lengths))
    with progress("scoring", total=len(plan), unit="micro-batches") as tick:
        for (rows,) in plan:
            pack = packing.pack(rows, prompts, responses, offsets)
            targets = pack.targets.to(device)
            values = lm(pack.to(device), lambda h, w, bias, t=targets: prime_kernels.linear_logprob(h, w, t, bias=bias))
            pack.put(flat, values.cpu())
            tick()
    return flat


def best_of(scores: np.ndarray, solved: np.ndarray, n: int) -> np.ndarray:
    """The choice is the sample with the highest of the scores (P, N); equals share alike."""
    total = scores.shape[1]
    weight = np.array([math.comb(total - 1 - rank, n - 1) for rank in range(total)]) / math.comb(total, n)
    chance = np.zeros(len(scores))
    for i, (score, right) in enumerate(zip(scores, solved, strict=True)):
        _, place, count = np.unique(-score, return_inverse=True, return_counts=True)
        chance[i] = weight @ (np.bincount(place, right) / count).repeat(count)
    return chance


def pass_at(solved: np.ndarray, n: int) -> np.ndarray:
    """The choice is an oracle's: right if any of the n is. The unbiased estimate of pass@n."""
    total = solved.shape[1]
    table = [1 - math.comb(total - right, n) / math.comb(total, n) for right in range(total + 1)]
    return np.array(table)[solved.sum(1)]


def majority(votes: Sequence[Sequence[str | None]], solved: np.ndarray, n: int) -> np.ndarray:
    """The choice is a sample with the commonest answer; equally common ones share alike, None abstains, and where all
    abstain it is any sample."""
    total = solved.shape[1]
    if math.comb(total, n) <= MAX_SUBSETS:
        subsets = np.array(list(combinations(range(total), n)))
    else:
        subsets = np.random.default_rng(0).random((MAX_SUBSETS, total)).argsort(1)[:, :n]
    chosen = np.zeros((len(subsets), total), dtype=int)
    np.put_along_axis(chosen, subsets, 1, axis=1)
    chance = np.zeros(len(solved))
    for i, (answers, right) in enumerate(zip(votes, solved, strict=True)):
        known = sorted({answer for answer in answers if answer is not None})
        gave = np.array([[answer == other for other in known] for answer in answers], dtype=int)  # (N, answers)
        count, good = chosen @ gave, chosen @ (gave * right[:, None])  # (subsets, answers)
        top = (count == count.max(1, keepdims=True, initial=0)) & (count > 0)
        worth = np.where(top, good / np.maximum(count, 1), 0).sum(1) / np.maximum(top.sum(1), 1)
        chance[i] = np.where(top.any(1), worth, chosen @ right / n).mean()
    return chance

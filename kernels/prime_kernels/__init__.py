"""Kernels for RL on packed responses, on torch alone: LM-head ops that never build the logits, and PRIME advantages."""

from prime_kernels.advantage import prime_advantage
from prime_kernels.dispatch import backends, last_used
from prime_kernels.linear_logprob import linear_logprob
from prime_kernels.linear_loss import linear_policy_loss, linear_prm_loss
from prime_kernels.reference import Advantage, PolicyLoss, PrmLoss

__version__ = "0.1.0"  # of the whole distribution; pyproject.toml and prime_fast take it from here

__all__ = [
    "Advantage",
    "PolicyLoss",
    "PrmLoss",
    "backends",
    "last_used",
    "linear_logprob",
    "linear_policy_loss",
    "linear_prm_loss",
    "prime_advantage",
]

"""The cpu back-end of the LM-head ops: torch's GEMMs in float32 and csrc/row_kernel.cpp."""

from functools import partial

import torch
from torch import Tensor

from prime_kernels import linear_fused, tune
from prime_kernels.dispatch import extension
from prime_kernels.linear_fused import Gradient, Policy, Upstream
from prime_kernels.reference import MAX_LOG_RATIO


class Rows:
    """See linear_fused. bfloat16 and float16 inputs are computed in float32, from a float32 copy of the weight."""

    operand = torch.float32
    streams = False

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None):
        self.bias = None if bias is None else bias.float().contiguous()
        self.temperature, self.softcap = temperature, softcap or 0.0
        self.logit_rows = self.chunk_rows = tune.cpu_rows(len(weight))

    def padded(self, rows: int) -> int:
        return max(rows, tune.CPU_GEMM_ROWS)

    def run(self, hidden, weight, targets, logits, gradient: Gradient | None, logprob, entropy, dlogits) -> None:
        linear_fused.product(hidden, weight.T, logits[: len(hidden)])
        policy = gradient if isinstance(gradient, Policy) else Policy(None, None, None, None, None, 0, 0, 0, 0, 0)
        upstream = gradient if isinstance(gradient, Upstream) else Upstream()
        pointers = *upstream, *policy[:5]
        extension("_C").row_kernel(
            logits.data_ptr(), *(len(targets), len(weight)), *map(_address, (targets, logprob, entropy, self.bias)),
            self.temperature, self.softcap, gradient is not None, *map(_address, pointers),
            policy.importance_cap, 1 - policy.clip_low, 1 + policy.clip_high, policy.entropy_coef, policy.kl_coef,
            MAX_LOG_RATIO, torch.get_num_threads(),
        )  # fmt: skip


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


logprob = partial(linear_fused.logprob, Rows), partial(linear_fused.logprob_backward, Rows)
policy_loss = partial(linear_fused.policy_loss, Rows)
prm_loss = partial(linear_fused.prm_loss, Rows)

"""PRIME advantages of packed responses."""

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from prime_kernels import checks, reference, reference_credit
from prime_kernels.dispatch import capturing, operator, resolve
from prime_kernels.reference import Advantage
from prime_kernels.reference_credit import CREDITS


@torch.no_grad()
def prime_advantage(
    prm_logprob: Tensor | None,
    ref_logprob: Tensor | None,
    outcome: Tensor,
    cu_seqlens: Tensor,
    group: Tensor,
    *,
    beta: float = 0.05,
    gamma: float = 1.0,
    outcome_gamma: float = 1.0,
    process_weight: float = 1.0,
    outcome_weight: float = 1.0,
    estimator: str = "rloo",
    form: str = "run",
    normalize: str = "batch",
    whiten: bool = True,
    credit: str = "published",
    step: Tensor | None = None,
    shrink: float = 0.0,
    prior: float = 0.5,
    slope: float = 0.0,
    drift: float = 0.0,
    process_group=None,
    backend: str | None = None,
) -> Advantage:
    """Advantages from the implicit process reward and the outcome (arXiv 2502.01456; PRIME-RL/PRIME 18ad596f).

    With q = prm_logprob - ref_logprob and the token reward r = q / (M + 1e-6), M the largest |sum of q from a token to
    its row's end| (normalize="batch"; beta cancels), or r = beta * q (normalize="none"), m_i the mean of r in row i:

        advantage_{i,t} = process_weight * sum_{s>=t} gamma^(s-t) a_{i,s} + outcome_weight * outcome_gamma^(L_i-1-t) b_i

    estimator="rloo", K rows in a group, form="run" (the published run's code): a = r * K/(K-1) - sum_j m_j / (K-1);
    form="paper" (the README's formula): a = r - sum_{j!=i} m_j / (K-1); both: b_i = o_i - mean_{j!=i} o_j.
    estimator="grpo" (eq. 7): a = (r - mean_j m_j) / (std_j m_j + 1e-6), b = (o - mean o) / (std o + 1e-6) with the
    unbiased std (the paper gives neither ddof nor epsilon); equal values in a group give 0.
    estimator="reinforce" (eq. 8): a = r, b = o. `form` only matters for rloo.
    whiten=True then maps all tokens to (x - mean) / sqrt(unbiased variance + 1e-8).

    credit: what becomes of the PRM's log-ratios. "published" is the above. The others, for estimator="rloo" (form and
    normalize play no part), cut each row into steps j = 0..J and give every token of step j of row i

        outcome_weight * outcome_gamma^(L_i-1-t) * (o_i - b_i) + process_weight * P_ij

    b_i: mean outcome of the group's other rows and of `shrink` pseudo-rows of outcome `prior` (0: RLOO). The PRM is a
    value of prefixes, V_j = sigmoid(u_i + slope * (beta * sum of q up to the end of step j - drift * (j + 1))) and
    V_{-1} = sigmoid(u_i),
    u_i = logit(b_i with max(shrink, 1) pseudo-rows); slope and drift calibrate it:

        critic     V_{-1} - V_{j-1}: the value in the place of a baseline, unbiased as that depends on the prefix alone
        pav        V_j - V_{j-1}: what the step changed (progress, after arXiv 2410.08146)
        lookahead  V_{min(j+1,J)} - V_{j-1}: for a PRM that notices one step late
        td         sum_{k>=j} gamma^(k-j) (B_k - B_{k-1}), B_k = b_i + V_k - V_{-1}, B_J = o_i: GAE of lambda = gamma
        odds       z_ij limited to +-3: the step's sum of q minus the mean of the batch's steps of that index, over the
                   root mean square of all of these (+ 1e-6 nats); slope plays no part

    Where slope is 0, or the PRM equals its reference and drift is 0, all but td are 0: the advantage is RLOO's.

    Args:
        prm_logprob, ref_logprob: (T,) float32, bfloat16 or float64 in nats, response tokens only, row after row. With
            process_weight=0 they never reach the advantage and may be None.
        outcome: (R,) float32 or float64. cu_seqlens: (R+1,) int32 or int64, 0, ..., T.
        group: (R,) int64, the same id for the rows of one prompt; any ids, any order, any K >= 2 (reinforce: >= 1).
        gamma, outcome_gamma: in 0..1.
        step: (T,) int32 or int64, the number of a token's step in its row: 0 at the row's start, the same or one more
            with each token. None: every token is a step.
        shrink, slope: 0 or more; prior: between 0 and 1. With a credit other than "published", outcome is in 0..1.
        process_group: a torch.distributed group whose ranks each hold whole groups: M and the whitening moments are
            then those of all ranks. (The published code takes M per rank: its rewards depend on the number of GPUs.)

    Returns Advantage, detached: advantage (T,), token_reward (T,) = beta * q, score (R,) = beta * sum of q; the last
    two are zeros without prm_logprob. float32, float64 if an input is; float64 inside. With one process, a row's result
    has the same bits wherever the row is packed, on every back-end.

    Raises ValueError naming the row or group: empty row, one-row group under rloo or grpo, bad cu_seqlens, shapes or
    dtypes, NaN or infinity; RuntimeError for a back-end that cannot run. What depends on values is checked while the
    op runs, so torch.compile(fullgraph=True) takes it. On CUDA the inputs need no host synchronisation: one launch
    ("triton": two, of other credits up to five) checks and computes, and one word is read back after it. Under CUDA
    graph capture nothing is read, and a batch with a bad value has NaN for every advantage; what must read is a
    ValueError there: no prm_logprob, a process_group, back-end "torch".
    """
    checks.one_of("estimator", estimator, ("rloo", "grpo", "reinforce"))
    checks.one_of("form", form, ("run", "paper"))
    checks.one_of("normalize", normalize, ("batch", "none"))
    checks.one_of("credit", credit, ("published", *CREDITS))
    checks.positive("beta", beta)
    checks.between("gamma", gamma, 0, 1)
    checks.between("outcome_gamma", outcome_gamma, 0, 1)
    checks.tensor("outcome", outcome, (None,), checks.REAL)
    rows = outcome.shape[0]
    checks.tensor("cu_seqlens", cu_seqlens, (rows + 1,), checks.OFFSETS, outcome, "one entry more than outcome")
    checks.tensor("group", group, (rows,), checks.INDEX, outcome, "one id for each row of outcome")
    if credit == "published":
        if step is not None or shrink:
            raise ValueError("step and shrink are of other credits than 'published': leave them out, or name a credit")
    elif estimator != "rloo":
        raise ValueError(f"credit {credit!r} compares with the other rows of a group: pass estimator='rloo'")
    for name, value in {"shrink": shrink, "slope": slope}.items():
        checks.between(name, value, 0, float("inf"))
    if not 0 < prior < 1 or not abs(shrink * slope * drift) < float("inf"):
        raise ValueError(f"prior is {prior}, slope {slope}, drift {drift}: needs 0 < prior < 1 and finite numbers")
    if step is not None:
        tokens = None if prm_logprob is None else prm_logprob.shape[0]
        checks.tensor("step", step, (tokens,), checks.OFFSETS, outcome, "one step number for each token")
    if (prm_logprob is None) != (ref_logprob is None) or (prm_logprob is None and process_weight):
        raise ValueError("prm_logprob or ref_logprob is None: pass both, or neither with process_weight=0")
    if prm_logprob is not None:
        checks.tensor("prm_logprob", prm_logprob, (None,), checks.LOGPROB, outcome)
        checks.tensor("ref_logprob", ref_logprob, prm_logprob.shape, checks.LOGPROB, outcome, "as prm_logprob")
    return Advantage(
        *torch.ops.prime_kernels.prime_advantage(
            prm_logprob, ref_logprob, outcome, cu_seqlens, group, beta, gamma, outcome_gamma, process_weight,
            outcome_weight, estimator, form, normalize, whiten, credit, step, shrink, prior, slope, drift,
            process_group and process_group.group_name, backend,
        )
    )  # fmt: skip


# One custom op whatever the back-end, so that torch.compile sees no data-dependent check; those are made when it runs.
@operator("prime_advantage")
def _prime_advantage(
    prm_logprob: Tensor | None, ref_logprob: Tensor | None, outcome: Tensor, cu_seqlens: Tensor, group: Tensor,
    beta: float, gamma: float, outcome_gamma: float, process_weight: float, outcome_weight: float,
    estimator: str, form: str, normalize: str, whiten: bool, credit: str, step: Tensor | None, shrink: float,
    prior: float, slope: float, drift: float, process_group: str | None, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = prm_logprob, ref_logprob, outcome
    published = credit == "published"
    implementation = resolve("prime_advantage", backend, tensors)
    check = functools.partial(
        _check_values, prm_logprob, ref_logprob, outcome, cu_seqlens, group, process_weight, estimator, credit, step
    )
    ranks = process_group and dist.distributed_c10d._resolve_process_group(process_group)
    if capturing() and (prm_logprob is None or ranks is not None or implementation is reference.advantage):
        raise ValueError(
            "prime_advantage would read from the GPU, which a CUDA graph cannot capture: pass prm_logprob, no "
            "process_group, and backend 'cuda' or 'triton'"
        )
    options = {
        "beta": beta, "gamma": gamma, "outcome_gamma": outcome_gamma, "process_weight": process_weight,
        "outcome_weight": outcome_weight, "whiten": whiten, "process_group": ranks,
    }  # fmt: skip
    if published:
        options |= {"estimator": estimator, "form": form, "normalize": normalize}
    else:
        options |= {"credit": credit, "step": step, "shrink": shrink, "prior": prior, "slope": slope, "drift": drift}
    if implementation is reference.advantage:
        check()
        implementation = reference.advantage if published else reference_credit.advantage
        result = implementation(prm_logprob, ref_logprob, outcome, cu_seqlens, group, **options)
        return tuple(x.to(_dtype(tensors)) for x in result)
    tokens = 0 if not len(outcome) else cu_seqlens[-1].item() if prm_logprob is None else len(prm_logprob)
    if not 0 < tokens < 2**31:
        check()
        raise ValueError(f"{tokens} tokens are more than the kernels count: split the batch or use backend='torch'")
    if prm_logprob is not None and prm_logprob.dtype != ref_logprob.dtype:
        prm_logprob, ref_logprob = prm_logprob.float(), ref_logprob.float()
    cu = _int32(cu_seqlens)
    arguments = (x if x is None else x.contiguous() for x in (prm_logprob, ref_logprob, outcome, cu, group))
    if step is not None:
        if len(step) != tokens:
            check()
        options["step"] = _int32(step).contiguous()
    result = implementation(*arguments, tokens=tokens, **options)
    if result is None:  # a kernel only sees that something is wrong
        check()
        raise ValueError("prm_logprob - ref_logprob leaves the range of float32: repair what computed them")
    return tuple(result)


@_prime_advantage.register_fake
def _(prm_logprob, ref_logprob, outcome, *_):
    tokens = torch.library.get_ctx().new_dynamic_size() if prm_logprob is None else prm_logprob.shape[0]
    dtype = _dtype((prm_logprob, ref_logprob, outcome))
    return tuple(outcome.new_empty(size, dtype=dtype) for size in (tokens, tokens, outcome.shape[0]))


def _dtype(tensors) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def _int32(x: Tensor) -> Tensor:
    """What it cannot hold stays outside of the batch."""
    return x if x.dtype == torch.int32 else x.clamp(-1, 2**31 - 1).int()


def _check_values(
    prm_logprob, ref_logprob, outcome, cu_seqlens, group, process_weight, estimator, credit, step
) -> None:
    if not len(outcome):
        raise ValueError("outcome has no rows: give every rank at least one group")
    tokens = cu_seqlens[-1].item() if prm_logprob is None else len(prm_logprob)
    checks.rows(cu_seqlens, tokens)
    checks.finite("outcome", outcome)
    if credit != "published" and (bad := ((outcome < 0) | (outcome > 1)).nonzero()).numel():
        i = bad[0].item()
        raise ValueError(f"outcome is {outcome[i].item()} in row {i}: credit {credit!r} needs outcomes from 0 to 1")
    if step is not None:
        checks.tensor("step", step, (tokens,), checks.OFFSETS, outcome, "one step number for each token")
        _check_step(step, cu_seqlens)
    if process_weight:
        checks.finite("prm_logprob", prm_logprob, cu_seqlens)
        checks.finite("ref_logprob", ref_logprob, cu_seqlens)
    if estimator != "reinforce":
        ids, count = group.unique(return_counts=True)
        if (alone := ids[count == 1]).numel():
            row = (group == alone[0]).nonzero()[0].item()
            raise ValueError(
                f"group {alone[0].item()} has one row, row {row}: {estimator} compares rows of a group; drop the group "
                "or use estimator='reinforce'"
            )


def _check_step(step: Tensor, cu_seqlens: Tensor) -> None:
    begins = cu_seqlens[:-1].long()
    rise = step.diff(prepend=step[:1])
    good = (rise == 0) | (rise == 1)
    good[begins] = step[begins] == 0
    if (bad := (~good).nonzero()).numel():
        i = bad[0].item()
        raise ValueError(
            f"step[{i}] is {step[i].item()} in row {(cu_seqlens <= i).sum().item() - 1}: a row's steps are numbered "
            "0, 0, 1, 1, 2, ..., from 0 on and without gaps"
        )

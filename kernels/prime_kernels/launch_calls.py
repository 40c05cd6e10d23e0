"""The calls of the launch gate: values for every parameter of every op, and how they are combined."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import prime_kernels
from prime_kernels import checks, tune
from prime_kernels.reference_credit import CREDITS

HEADS = (1, 16, 17, 64, 100, 128, 321, 576, 896, 1536, 2048, 2112, 3584, 4001, 8192)  # hidden sizes
OUTER = ("dtype", "H", "PRIME_KERNELS_LOGITS")  # combined each with each; of the other axes, any two

Setting = dict[str, Any]  # axis -> its value in this call


class Op(NamedTuple):
    axes: dict[str, tuple]  # what varies, the plain value first and the richest last: a parameter or what `make` reads
    make: dict[str, Callable[[Setting], Any]]  # the parameters that are no axis


def floats(*shape: int, dtype=torch.float32, layout: str = "packed", grad: bool = False) -> torch.Tensor:
    """Ones; "strided": not contiguous, "misaligned": contiguous but not from a multiple of 16 bytes on; "wide": rows of
    a matrix with one column more, of which a single one is contiguous to torch."""
    if layout == "wide" and len(shape) == 2:
        return torch.ones(shape[0], shape[1] + 1, dtype=dtype)[:, :-1].requires_grad_(grad)
    if layout == "strided":
        return torch.ones(*shape, 2, dtype=dtype)[..., 0].requires_grad_(grad)
    start = int(layout == "misaligned")
    return torch.ones(start + torch.Size(shape).numel(), dtype=dtype)[start:].view(shape).requires_grad_(grad)


def matrix(name: str, *sizes) -> Callable[[Setting], torch.Tensor]:
    def make(s: Setting) -> torch.Tensor:
        return floats(*(size(s) for size in sizes), dtype=s["dtype"], layout=s["layout"], grad=name in s["grads"])

    return make


def tokens(s: Setting) -> int:
    return sum(s["rows"])


def per_token(s: Setting) -> torch.Tensor:
    return floats(tokens(s), dtype=s["vectors"], layout=s["layout"])


def per_row(s: Setting) -> torch.Tensor:
    return floats(len(s["rows"]), dtype=s["vectors"])


def integers(values: list[int], s: Setting, dtype=torch.int64) -> torch.Tensor:
    """In the layouts of `floats`."""
    made = torch.tensor(values, dtype=dtype)
    if s["layout"] == "strided":
        return made.repeat_interleave(2)[::2]
    return torch.cat([made.new_zeros(1), made])[1:] if s["layout"] == "misaligned" else made


def offsets(s: Setting) -> torch.Tensor:
    return integers([0, *itertools.accumulate(s["rows"])], s, s["offsets"])


def ids(s: Setting) -> torch.Tensor:
    return integers([0] * len(s["rows"]), s)


def logprobs(s: Setting, dtype: str) -> torch.Tensor | None:
    return None if s[dtype] is None else floats(tokens(s), dtype=s[dtype], layout=s["layout"])


def credit(s: Setting) -> str:
    return s["credit"] if len(s["rows"]) > 1 else "published"  # the others compare rows


def step_numbers(s: Setting) -> torch.Tensor | None:
    """Steps of two tokens."""
    if s["step"] is None or credit(s) == "published":
        return None
    return integers([t // 2 for length in s["rows"] for t in range(length)], s, s["step"])


def estimator(s: Setting) -> str:
    if credit(s) != "published":
        return "rloo"
    return s["kind"] if len(s["rows"]) > 1 else "reinforce"  # which compares no rows


def given(axis: str, make: Callable) -> Callable[[Setting], torch.Tensor | None]:
    return lambda s: make(s) if s[axis] else None


@contextmanager
def alone() -> Iterator[dist.ProcessGroup]:
    """A process group of this process, unless it is in one."""
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        if own:
            dist.destroy_process_group()


ROWS = ((16, 16), (1,), (5, 3, 17))  # tokens of each row
HEAD_AXES = {
    "dtype": tuple(dtype for dtype in checks.HIDDEN if dtype != torch.float64),
    "H": HEADS,
    "PRIME_KERNELS_LOGITS": (None, *tune.PATHS),
    "V": (48, 1, 37),
    "rows": ((), *ROWS),
    "PRIME_KERNELS_CHUNK_ROWS": (None, "7"),
    "layout": ("packed", "strided", "wide", "misaligned"),
    "grads": ((), ("weight",), ("hidden",), ("hidden", "weight", "bias")),
    "with_bias": (False, True),
    "softcap": (None, 30.0),
}
HEAD = {
    "hidden": matrix("hidden", tokens, lambda s: s["H"]),
    "weight": matrix("weight", lambda s: s["V"], lambda s: s["H"]),
    "bias": given("with_bias", matrix("bias", lambda s: s["V"])),
    "targets": lambda s: integers([0] * tokens(s), s),
}
OPS = {
    "linear_logprob": Op(
        HEAD_AXES
        | {"temperature": (1.0, 0.7), "entropy": (False, True), "backward": (slice(1), slice(1, 2), slice(2))},
        HEAD,
    ),
    "linear_policy_loss": Op(
        HEAD_AXES
        | {"vectors": checks.REAL, "off_policy": (False, True), "clip_low": (0.2, 0.0), "clip_high": (0.2, 0.0)}
        | {"temperature": (1.0, 0.7), "entropy_coef": (0.0, 0.1), "kl_coef": (0.0, 0.1)}
        | {"other_sampler": (False, True), "importance_cap": (2.0, 1.0)},
        HEAD
        | {"advantage": per_token, "token_weight": per_token}
        | {"old_logprob": given("off_policy", per_token), "ref_logprob": given("kl_coef", per_token)}
        | {"sampling_logprob": given("other_sampler", per_token)},
    ),
    "linear_prm_loss": Op(
        HEAD_AXES
        | {"vectors": checks.REAL, "offsets": checks.OFFSETS, "with_row_weight": (False, True), "beta": (0.05, 1.0)}
        | {"with_intercept": (False, True), "every_prefix": (False, True)},
        HEAD
        | {"ref_logprob": per_token, "outcome": per_row, "cu_seqlens": offsets}
        | {"row_weight": given("with_row_weight", per_row), "intercept": given("with_intercept", per_row)},
    ),
    "prime_advantage": Op(
        {
            "prm": (torch.float32, None, torch.bfloat16),
            "ref": (torch.float32, torch.bfloat16),
            "vectors": (torch.float32,),
            "offsets": checks.OFFSETS,
            "rows": ((3,) * 16, *ROWS),
            "layout": ("packed", "strided", "wide", "misaligned"),
            "several_ranks": (False, True),
            "beta": (0.05, 1.0),
            "gamma": (1.0, 0.9),
            "outcome_gamma": (1.0, 0.0, 0.9),
            "weight": (1.0, 0.0, 0.5),
            "outcome_weight": (1.0, 0.0, 0.5),
            "kind": ("rloo", "reinforce", "grpo"),
            "form": ("run", "paper"),
            "normalize": ("none", "batch"),
            "whiten": (False, True),
            "credit": ("published", *CREDITS),
            "step": (None, *checks.OFFSETS),
            "shrink": (0.0, 1.5),
            "prior": (0.5, 0.3),
            "slope": (0.0, 0.1),
            "drift": (0.0, 0.1),
        },
        {
            "prm_logprob": lambda s: logprobs(s, "prm"),
            "ref_logprob": lambda s: None if s["prm"] is None else logprobs(s, "ref"),
            "process_weight": lambda s: 0.0 if s["prm"] is None else s["weight"],
            "outcome": per_row,
            "cu_seqlens": offsets,
            "group": ids,
            "estimator": estimator,
            "credit": credit,
            "step": step_numbers,
            "shrink": lambda s: 0.0 if credit(s) == "published" else s["shrink"],
            "process_group": given("several_ranks", lambda s: dist.group.WORLD),
        },
    ),
}


def settings(op: str, heads: tuple[int, ...] = HEADS, strength: int = 2) -> Iterator[Setting]:
    """The calls of an op: any `strength` values of different axes meet in one, and all the last values do."""
    axes = parameters(op).axes
    if "H" in axes:
        axes = axes | {"H": heads}
    outer = {name: axes[name] for name in OUTER if name in axes}
    inner = list(covering({name: values for name, values in axes.items() if name not in outer}, strength))
    for values in itertools.product(*outer.values()):
        for rest in inner:
            yield dict(zip(outer, values, strict=True)) | rest


def covering(axes: dict[str, tuple], strength: int) -> Iterator[Setting]:
    """Few settings in which any `strength` values of different axes meet, after one of all the last values."""
    groups = list(itertools.combinations(axes, strength))
    missing = {
        tuple(zip(group, places, strict=True)): None  # a dict is a set in order
        for group in groups
        for places in itertools.product(*(range(len(axes[name])) for name in group))
    }
    chosen = {name: len(values) - 1 for name, values in axes.items()}
    while True:
        for group in groups:
            missing.pop(tuple((name, chosen[name]) for name in group), None)
        yield {name: axes[name][place] for name, place in chosen.items()}
        if not missing:
            return
        chosen = dict(next(iter(missing)))
        for name, values in axes.items():
            if name in chosen:
                continue

            def news(place: int, known=chosen, name=name) -> int:
                known = known | {name: place}
                return sum(all(known.get(axis) == at for axis, at in pair) for pair in missing)

            chosen[name] = max(range(len(values)), key=news)


def parameters(op: str) -> Op:
    """What is known of an op; ValueError for an op, or one of its parameters, that is not varied here."""
    if op not in OPS:
        raise ValueError(f"the launch gate does not know {op}: add it to launch_calls.OPS")
    known = OPS[op]
    names = set(inspect.signature(getattr(prime_kernels, op)).parameters) - {"backend"}
    if new := names - known.make.keys() - known.axes.keys():
        raise ValueError(f"the launch gate does not vary {', '.join(sorted(new))} of {op}: add it to launch_calls.OPS")
    if gone := known.make.keys() - names:
        raise ValueError(f"{op} has no {', '.join(sorted(gone))}: take it out of launch_calls.OPS")
    return known


def arguments(op: str, setting: Setting) -> dict[str, Any]:
    known = parameters(op)
    names = inspect.signature(getattr(prime_kernels, op)).parameters
    return {n: known.make[n](setting) if n in known.make else setting[n] for n in names if n != "backend"}

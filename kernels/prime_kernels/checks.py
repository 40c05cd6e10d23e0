"""Argument checks shared by the ops: a message names the argument, what it got and the fix."""

import os

import torch

HIDDEN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REAL = (torch.float32, torch.float64)
LOGPROB = (torch.float32, torch.float64, torch.bfloat16)
INDEX = (torch.int64,)
OFFSETS = (torch.int32, torch.int64)


def tensor(name: str, value, shape: tuple, dtypes: tuple, like: torch.Tensor | None = None, why: str = "") -> None:
    """ValueError unless `value` is a plain tensor of this shape (None: any size) and dtype, on the device of `like`."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, needs a torch.Tensor of shape {_text(shape)}")
    if hasattr(value, "full_tensor"):
        raise ValueError(f"{name} is a DTensor, needs a plain tensor: pass {name}.full_tensor()")
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} is {value.dtype}, needs {names}: pass {name}.to({dtypes[0]})")
    if len(value.shape) != len(shape) or any(b not in (None, a) for a, b in zip(value.shape, shape, strict=True)):
        raise ValueError(f"{name} has shape {_text(value.shape)}, needs {_text(shape)}{why and ': ' + why}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, the other arguments on {like.device}: move it there with .to()")


def head(hidden, weight, targets, bias, temperature: float, softcap: float | None) -> None:
    """The arguments every LM-head op has. PRIME_KERNELS_CHECK=1 also checks the targets' range, which syncs."""
    tensor("hidden", hidden, (None, None), HIDDEN, why="select the response tokens first, (N, H)")
    size = hidden.shape[1]
    tensor(
        "weight", weight, (None, size), (hidden.dtype,), hidden, "(V, H), gathered: under ZeRO-3 call inside its module"
    )
    tensor("targets", targets, (hidden.shape[0],), INDEX, hidden, "one token id for each row of hidden")
    if bias is not None:
        tensor("bias", bias, (weight.shape[0],), (hidden.dtype,), hidden, "one entry for each row of weight")
    positive("temperature", temperature)
    if softcap is not None:
        positive("softcap", softcap)
    if os.environ.get("PRIME_KERNELS_CHECK") == "1":
        bad = ((targets < 0) | (targets >= weight.shape[0])).nonzero()
        if bad.numel():
            i = bad[0].item()
            raise ValueError(f"targets[{i}] is {targets[i].item()}, needs 0 <= id < {weight.shape[0]}: pass token ids")


def positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}, needs a number above 0")


def between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, needs {low} <= {name} <= {high}")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, needs one of {', '.join(choices)}")


def rows(cu_seqlens: torch.Tensor, tokens: int) -> None:
    """ValueError unless cu_seqlens cuts 0..tokens into rows of one token or more. Syncs with the host."""
    before, after = cu_seqlens[:-1], cu_seqlens[1:]  # compared, as a difference may overflow
    first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
    if (descending := (after < before).nonzero()).numel():
        raise ValueError(f"cu_seqlens falls after row {descending[0].item()}: pass the running sum of the row lengths")
    if first != 0 or last != tokens:
        raise ValueError(f"cu_seqlens runs from {first} to {last}, needs 0 to {tokens}, the number of tokens given")
    if (empty := (after == before).nonzero()).numel():
        raise ValueError(f"row {empty[0].item()} has no token: drop rows with an empty response")


def finite(name: str, value: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> None:
    """ValueError naming the first row with a NaN or infinity. Syncs with the host."""
    if (bad := (~value.isfinite()).nonzero()).numel():
        i = bad[0].item()
        row = i if cu_seqlens is None else (cu_seqlens <= i).sum().item() - 1
        raise ValueError(f"{name} is {value[i].item()} in row {row}: drop the row or repair what computed it")


def _text(shape) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"

"""Float32 weights and AdamW's moments under ZeRO-3 as named tensors, so that any number of ranks can take them up.

DeepSpeed cuts each parameter, flattened, into equal parts, one a rank, and joins a rank's parts in flat groups. A file
holds a rank's parts by the names of the parameters, without padding; a rank that continues reads its range of each from
whichever files have it. DeepSpeed's own checkpoints are pickles, which run code when they are loaded, are written while
training waits, and can only be loaded by as many ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from prime_fast.engine import distributed

WEIGHT, MOMENTS, STEP = "weight", ("exp_avg", "exp_avg_sq"), "step"
FILES = "rank-*.safetensors"

Parameters = Sequence[tuple[str, nn.Parameter]]  # of the trained model, partitioned, by name


class HostCopies:
    """Copies of tensors in host memory, in buffers that are kept for the next time: fresh pages take longer than the
    copy."""

    def __init__(self, pinned: bool) -> None:
        self.pinned, self.buffers = pinned, {}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self.pinned)
        return self.buffers[name].copy_(tensor)


def file_name(rank: int) -> str:
    return FILES.replace("*", f"{rank:05d}")


def copied(optimizer: Any, parameters: Parameters, copies: HostCopies) -> dict[str, Tensor]:
    """This rank's parts on the host, as `restore` takes them. optimizer: DeepSpeed's for stage 3."""
    flat: dict[tuple[str, int], Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for group, weights in enumerate(optimizer.fp32_partitioned_groups_flat):
        flat[WEIGHT, group] = copies(f"{WEIGHT} {group}", weights.detach())
        state = optimizer.optimizer.state.get(weights, {})  # none before the first step
        flat |= {(kind, group): copies(f"{kind} {group}", state[kind]) for kind in MOMENTS if kind in state}
        if STEP in state:
            tensors[STEP] = state[STEP].detach().cpu().clone()  # the same in every group
    for name, parameter, group, offset in _parts(optimizer, parameters):
        start, stop = _range(parameter, distributed.rank(), distributed.world_size())
        for kind in (WEIGHT, *MOMENTS):
            if (kind, group) in flat:
                tensors[f"{kind}/{name}"] = flat[kind, group][offset : offset + stop - start]
    return tensors


def restore(optimizer: Any, parameters: Parameters, folder: Path) -> None:
    """Take up what the ranks of another run, however many, have written into `folder`."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob(FILES))]
    if not files:
        raise ValueError(
            f"{folder} holds no optimizer states, as those of engine.offload=disk are not kept; start a new run_dir "
            "with the checkpoint's model as model.policy"
        )
    trained = STEP in set(files[0].keys())
    kinds = (WEIGHT, *MOMENTS) if trained else (WEIGHT,)
    groups = [
        {kind: torch.zeros(weights.numel()) for kind in kinds} for weights in optimizer.fp32_partitioned_groups_flat
    ]
    for name, parameter, group, offset in _parts(optimizer, parameters):
        start, stop = _range(parameter, distributed.rank(), distributed.world_size())
        for kind in kinds:
            into = groups[group][kind][offset : offset + stop - start]
            _read(files, f"{kind}/{name}", parameter, start, into)
    state = optimizer.state_dict()
    state["fp32_flat_groups"] = [group.pop(WEIGHT) for group in groups]
    steps = [{STEP: files[0].get_tensor(STEP)} if trained else {} for _ in groups]
    adam = {index: group | step for index, (group, step) in enumerate(zip(groups, steps, strict=True)) if trained}
    state["optimizer_state_dict"] = state["optimizer_state_dict"] | {"state": adam}
    optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict({distributed.rank(): state})  # it takes its rank's of all
    optimizer.checkpoint_event_epilogue()


def _read(files: list, key: str, parameter: nn.Parameter, start: int, into: Tensor) -> None:
    """The elements of a flattened parameter from `start` on, from the files that hold them."""
    for rank, file in enumerate(files):
        first, last = _range(parameter, rank, len(files))
        low, high = max(first, start), min(last, start + len(into))
        if low < high:
            into[low - start : high - start] = file.get_slice(key)[low - first : high - first]


def _parts(optimizer: Any, parameters: Parameters) -> Iterator[tuple[str, nn.Parameter, int, int]]:
    """(name, parameter, its group, where this rank's part of it begins there)."""
    for name, parameter in parameters:
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        yield name, parameter, group, offset


def _range(parameter: nn.Parameter, rank: int, ranks: int) -> tuple[int, int]:
    """Which elements of a flattened parameter a rank of so many holds."""
    size = -(-parameter.ds_numel // ranks)
    return min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)

"""Tensors as the bytes of a .safetensors file, one after another: safetensors' own writer keeps Python's lock from
start to end, and so would stop the training beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

DTYPES = {  # as the format calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def blocks(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """tensors: on the host and contiguous; they must not change until they are taken."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # each is aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        yield memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())

"""Shipped sizes of the LM-head kernels, by chip and head only: never by the number of tokens, so that the bits of a
row's log-prob depend neither on its neighbours nor on the packing."""

import os
from typing import NamedTuple

import torch

PATHS = ("fused", "gemm")
LOGIT_ROWS = 1024  # rows of float32 logits alive at once: 0.6 GB at V = 152k; every logits GEMM has exactly these
CHUNK_ROWS = 4096  # rows of bfloat16 dlogits per gradient GEMM: 1.2 GB at V = 152k. Fewer, and reading and writing the
# float32 weight gradient once a chunk shows beside the GEMM

BLOCK_ROWS = 128  # of the vocabulary kernel, which writes whole blocks of logits
CPU_LOGITS = 2**25  # float32 logits alive at once on a CPU
CPU_GEMM_ROWS = 16  # MKL computes a row of fewer differently


class Tile(NamedTuple):
    """Shape of the vocabulary kernel: a program owns `rows` rows and 1/`splits` of the vocabulary."""

    rows: int
    columns: int
    depth: int  # of the hidden size, per pipeline stage
    splits: int
    group: int  # row blocks that run side by side, so that their hidden states and weights stay in L2
    warps: int
    stages: int
    descriptors: bool  # load by TMA


class Row(NamedTuple):
    """Shape of the row kernel: a program owns a row and walks it `block` columns at a time."""

    block: int
    warps: int


ROW = Row(4096, 8)


def chip(device: torch.device) -> int:
    """80 or 90: whose configurations this device runs. Hopper has its own; any other chip takes Ampere's."""
    return 90 if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9 else 80


def fits(hidden: int, vocabulary: int, operand: torch.dtype) -> bool:
    """Whether the vocabulary kernel takes such a head without spills, and launches."""
    return operand == torch.bfloat16 and hidden >= 128 and hidden % 64 == 0 and vocabulary % 16 == 0


def tile(chip: int, hidden: int, vocabulary: int, operand: torch.dtype, plain: bool) -> Tile:
    """The widest tile that compiles without spills. `plain`: neither bias nor softcap, whose registers it lacks."""
    if not fits(hidden, vocabulary, operand):
        raise ValueError(
            "PRIME_KERNELS_LOGITS is 'fused', which takes bfloat16, a hidden size from 128 on in steps of 64 and a "
            f"vocabulary in steps of 16, not {operand}, {hidden} and {vocabulary}: unset it or use 'gemm'"
        )
    return Tile(BLOCK_ROWS, 256 if chip == 90 and plain else 128, 64, 16, 16, 8, 3, descriptors=chip == 90)


def gpu_rows(in_place: bool) -> tuple[int, int]:
    """(rows of dlogits, rows of logits) alive at once on a GPU. PRIME_KERNELS_CHUNK_ROWS overrides the first."""
    chunk = int(os.environ.get("PRIME_KERNELS_CHUNK_ROWS") or (LOGIT_ROWS if in_place else CHUNK_ROWS))
    blocks = -(-chunk // BLOCK_ROWS) * BLOCK_ROWS
    return chunk, blocks if in_place else min(blocks, LOGIT_ROWS)


def cpu_rows(vocabulary: int) -> int:
    """Rows of logits alive at once on a CPU. PRIME_KERNELS_CHUNK_ROWS overrides."""
    return int(os.environ.get("PRIME_KERNELS_CHUNK_ROWS") or max(CPU_GEMM_ROWS, CPU_LOGITS // vocabulary))


def path(chip: int, hidden: int, vocabulary: int, operand: torch.dtype) -> str:
    """Where logits come from, in every op alike, so that equal weights give equal bits whichever op computes them.

    "fused": the vocabulary kernel, whose log-probs need no logits in memory; on Hopper, as its programs leave much of a
    smaller chip idle. "gemm": cuBLAS, then the row kernel, which re-reads the float32 logits: 20% of the GEMM's time at
    H = 3584 on an H100, 48% at H = 1536 by bandwidth. PRIME_KERNELS_LOGITS overrides.
    """
    pays = chip == 90 and hidden <= 2048 and fits(hidden, vocabulary, operand)
    chosen = os.environ.get("PRIME_KERNELS_LOGITS") or ("fused" if pays else "gemm")
    if chosen not in PATHS:
        raise ValueError(f"PRIME_KERNELS_LOGITS is {chosen!r}, needs one of {', '.join(PATHS)}")
    return chosen

"""What one packed micro-batch takes beyond the states: activations, and the LM head's buffers.

Tested against what autograd saves in a real model. Sizes are for packs as full as engine.micro_tokens allows.
"""

from __future__ import annotations

from functools import cache

import torch

from prime_fast.engine.recompute import Recompute
from prime_fast.memory.items import Item
from prime_fast.memory.shapes import Shape
from prime_kernels import tune
from prime_kernels.linear_cpu import Rows as CPURows
from prime_kernels.linear_fused import Head


class GPURows:
    """The sizes of linear_loss_triton.Rows, for machines without Triton. Logits always have a buffer: on Hopper alone
    some heads do without in a forward."""

    streams = False

    def __init__(self, hidden: torch.Tensor, *_: object) -> None:
        self.operand = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
        self.chunk_rows, self.logit_rows = tune.gpu_rows(in_place=self.operand == torch.float32)

    def padded(self, rows: int) -> int:
        return self.logit_rows


def saved_by_layer(shape: Shape, width: int, ranks: int = 0) -> int:
    """Bytes a token that a decoder layer keeps for its backward: of each norm its input in float32, the normed input
    and the output; queries, keys and values with the heads repeated, the attention's output (and the copy of it that
    enters o_proj), a float32 log-sum-exp a head; gate, its activation, up, their product.

    ranks: of a layer's adapters together, whose inner products are kept as well. The weights are frozen then, and a
    norm whose weight is needs no normed input; with adapters on some of the linear layers alone it may be less.
    """
    normed = 0 if ranks else width
    norms = 2 * (shape.hidden * (4 + width + normed) + 4)
    queries = shape.normed_heads * (shape.head_size * (4 + normed) + 4)
    attention = shape.heads * (5 * shape.head_size * width + 4)
    return norms + queries + attention + 4 * shape.intermediate * width + ranks * width


def attention_outputs(shape: Shape, width: int) -> int:
    """Bytes a token of what the attention's op returns: its output, a float32 log-sum-exp a head."""
    return shape.heads * (shape.head_size * width + 4)


def saved(shape: Shape, width: int, recompute: Recompute, ranks: int = 0) -> int:
    """Bytes a token that the whole model keeps until its backward begins: of a recomputed layer its input.

    ranks: see saved_by_layer. No gradient goes through the first norm of a frozen model.
    """
    kept = shape.hidden * width + (attention_outputs(shape, width) if recompute.attention else 0)
    layers = recompute.layers * kept + (recompute.of - recompute.layers) * saved_by_layer(shape, width, ranks)
    first_norm = shape.hidden * 4 + 4 if ranks and not recompute.layers else 0
    last_norm = shape.hidden * (4 if ranks else 4 + width) + 4
    rotation = 2 * shape.head_size * width
    return layers - first_norm + last_norm + rotation


def working(shape: Shape, width: int) -> int:
    """Bytes a token inside a layer, forward or backward: four tensors of the MLP, the residual stream and a norm."""
    return 4 * shape.intermediate * width + shape.hidden * (2 * width + 8)


@cache
def head_buffers(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    on_gpu: bool,
    backward: bool,
    longest: int | None = None,
    frozen: bool = False,
) -> int:
    """Bytes that prime_kernels.linear_fused.Head allocates, counted from a real one on the meta device.

    longest: tokens of a response, for prm_loss of whole responses: it makes dlogits ahead, and sums those of a long
    one's parts apart. frozen: the weight needs no gradient.
    """
    rows_type = GPURows if on_gpu else CPURows
    hidden = torch.empty(tokens, shape.hidden, dtype=dtype, device="meta")
    weight = torch.empty(shape.vocabulary, shape.hidden, dtype=dtype, device="meta")
    ahead = backward and longest is not None
    head = Head(rows_type, hidden, weight, None, 1.0, None, (backward, backward and not frozen, False), ahead=ahead)
    aside = head.sums.empty_like() if ahead and longest > head.kernel.chunk_rows else ()
    given = {id(hidden), id(weight)}
    tensors = [x for x in (*vars(head).values(), *head.sums, *aside) if isinstance(x, torch.Tensor)]
    made = {id(x): x.nbytes for x in tensors if id(x) not in given}
    rows = min(tokens, head.room) if backward else 0
    scaled = rows * shape.hidden * (4 + dtype.itemsize)  # a chunk's dX in float32, its hidden states scaled (prm_loss)
    return sum(made.values()) + scaled


def scoring(role: str, shape: Shape, tokens: int, dtype: torch.dtype, on_gpu: bool) -> list[list[Item]]:
    """The moments of a forward without gradients: in a layer, in the LM head."""
    width = dtype.itemsize
    stream = Item(f"{role}: hidden states", tokens * 2 * shape.hidden * width)
    layer = Item(f"{role}: inside a layer", tokens * working(shape, width))
    head = Item(f"{role}: LM-head buffers", head_buffers(shape, tokens, dtype, on_gpu, backward=False))
    return [[stream, layer], [stream, head]]


def training(
    role: str,
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    on_gpu: bool,
    recompute: Recompute,
    longest: int | None,
    ranks: int = 0,
) -> dict[str, list[Item]]:
    """The moments of a forward and backward: in the LM head, in its backward, in the last layer's, at the embedding,
    which a frozen model's does not reach.

    longest: see head_buffers; ranks: see saved_by_layer.
    """
    width, frozen = dtype.itemsize, ranks > 0
    kept = Item(f"{role}: activations", tokens * saved(shape, width, recompute, ranks))
    stream = Item(f"{role}: hidden states", tokens * 2 * shape.hidden * width)
    buffers = head_buffers(shape, tokens, dtype, on_gpu, backward=True, longest=longest, frozen=frozen)
    head = Item(f"{role}: LM-head buffers", buffers)
    # the gradients that the forward made, and backward's scaled copies of them (linear_loss.py _scaled)
    weight = 0 if frozen else shape.head
    gradients = Item(f"{role}: LM-head gradients", 2 * width * (weight + tokens * shape.hidden))
    layer = working(shape, width)
    if recompute.layers == recompute.of:  # else the last layer is not, and its activations make room for the others'
        layer += saved_by_layer(shape, width, ranks) - (attention_outputs(shape, width) if recompute.attention else 0)
    tied = Item(f"{role}: tied LM-head gradient", width * weight if shape.tied else 0)
    moments = {
        "head": [kept, stream, head],
        "head backward": [kept, stream, gradients],
        "layer backward": [kept, Item(f"{role}: inside a layer", tokens * layer), tied],
    }
    if not frozen:
        moments["embedding backward"] = [tied, Item(f"{role}: embedding gradient", width * shape.head)]
    return moments

"""Ops of the CPU's tests on another device: their arguments go there and their results come back, gradients too."""

import functools

import torch


def on_device(op, device: str):
    """The op with its tensors copied to `device` and its results to the CPU: both keep every bit."""

    @functools.wraps(op)
    def there(*args, **kwargs):
        result = op(*(_to(x, device) for x in args), **{name: _to(x, device) for name, x in kwargs.items()})
        if isinstance(result, torch.Tensor):
            return result.cpu()
        back = [x.cpu() for x in result]
        return type(result)(*back) if hasattr(result, "_fields") else tuple(back)

    return there


def _to(x, device: str):
    return x.to(device) if isinstance(x, torch.Tensor) else x

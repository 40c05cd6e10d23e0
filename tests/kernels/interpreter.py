"""Triton's interpreter patches triton.language at a launch and again at every call of a device function within: half
of its time and more, but what the first call of each function has patched stays so."""

from functools import cache

from triton.runtime import interpreter


def patch_once() -> None:
    patched = cache(interpreter._patch_lang)

    def call(function, *args, **kwargs):
        patched(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call

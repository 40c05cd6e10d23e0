"""Triton's interpreter patches triton.language at a launch and again at every call of a device function within, which is
more than half of its time, though the first call of each has left nothing to patch."""

from functools import cache

from triton.runtime import interpreter


def patch_once() -> None:
    patched = cache(interpreter._patch_lang)

    def call(function, *args, **kwargs):
        patched(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call

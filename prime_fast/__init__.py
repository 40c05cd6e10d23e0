"""PRIME: reinforcement learning with online implicit process rewards."""


def __getattr__(name: str) -> str:
    """`__version__`, without loading torch for those who do not ask."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prime_kernels import __version__

    return __version__

"""The code that a reward function of the user's is made of."""

import hashlib
import sys
import sysconfig
from collections.abc import Collection
from pathlib import Path

from prime_fast.rewards.functions import BUILT_IN

OURS = ("prime_fast", "prime_kernels")  # known by their version
INSTALLED = ("site-packages", "dist-packages")
DIGEST_CHARS = 12


def of(reward: str, known: Collection[str]) -> dict[str, str]:
    """{module: digest of its file} of a loaded function's own module and of what came with it: the modules that are not
    in `known`, but for the standard library and, unless they are of the function's own package, installed packages.

    What the function imports only when it is called, and files that it reads, are not among them.
    """
    if reward in BUILT_IN:
        return {}
    place, _, function = reward.rpartition(":")
    main = Path(place).stem if place.endswith(".py") else place
    package = main.partition(".")[0]
    standard = Path(sysconfig.get_path("stdlib"))
    found = {"function": function}
    for name, module in sorted(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "")
        top = name.partition(".")[0]
        installed = path.is_relative_to(standard) or any(part in INSTALLED for part in path.parts)
        own = name not in known and top not in OURS and (top == package or not installed)
        if path.is_file() and (own or name == main):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:DIGEST_CHARS]
    return found

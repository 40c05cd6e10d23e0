"""docs/measured.md, every figure from a committed JSON: python -m benchmarks.measured docs/measured.md

A section is a function: its words, its tables, and figures that are only ever read from benchmarks/results.
tests/test_docs.py compares the page with this, and finds a figure that somebody typed into the words.
"""

from __future__ import annotations

from benchmarks.measured import elsewhere, learning, speed, trust
from benchmarks.measured.words import load

SECTIONS = (
    *(learning.learning, learning.one_seed, learning.addition, learning.chain10, learning.gentle, learning.published),
    *(learning.lora, learning.credit_forms, learning.ahead, learning.step_labels, learning.best_of),
    *(elsewhere.offline_prm, elsewhere.in_trl),
    *(speed.lm_head, speed.advantages, speed.whole_steps, speed.overlap, speed.rollouts, speed.collection),
    *(speed.checkpoints, trust.rewards, trust.watchers, trust.chaos, trust.soak, trust.intervals, trust.gpu),
)


def page() -> str:
    sections = (f"## {part.__doc__.rstrip('.')}\n\n{part().strip()}" for part in SECTIONS)
    return "\n\n".join([introduction(), *sections]) + "\n"


def introduction() -> str:
    cpu = load("lm_head.json")["machine"]
    return f"""# Measured

Written by `python -m benchmarks.measured docs/measured.md` from the files of `benchmarks/results`; a test compares
them, so no figure here is typed by hand.

Hardware of every number: {cpu["cores"]} cores of an {cpu["device"]} (AVX2), no GPU; one thread a run unless said
otherwise. A command is what made the JSON named beside it."""

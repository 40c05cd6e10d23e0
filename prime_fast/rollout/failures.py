"""Responses that got no verdict: their shares, and the end of a run that has too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from prime_fast.data.rows import Rows
from prime_fast.data.shapes import named
from prime_fast.engine.batch import Group
from prime_fast.engine.distributed import Stop
from prime_fast.rewards.code import LIMITS

KINDS = {
    "errors": ("errors",),
    "timeouts": ("timeouts", "stopped"),
    "crashes": ("crashes",),
}  # of `rewards.pool.Verdict`


def shares(groups: Sequence[Group]) -> dict[str, float]:
    """Of the groups' responses: those whose reward raised, ran out of time (programs stopped in their sandbox are among
    them), or killed its worker."""
    found, count = _counted(groups)
    return {f"reward_{name}": sum(found[kind] for kind in kinds) / count for name, kinds in KINDS.items()}


def limits(groups: Sequence[Group]) -> dict[str, float]:
    """Of the groups' programs, if there are any: the share that hit each limit of the sandbox, the most memory of one
    and the mean CPU time of all."""
    programs = [usage for group in groups for usage in group.programs]
    if not programs:
        return {}
    shares = {f"sandbox_{name}": sum(name in usage.limits for usage in programs) / len(programs) for name in LIMITS}
    seconds = sum(usage.seconds for usage in programs) / len(programs)
    return shares | {
        "sandbox_peak_mib": max(usage.memory for usage in programs) / (1 << 20),
        "sandbox_cpu_seconds": seconds,
    }


def unscored(groups: Sequence[Group]) -> float:
    """The share of the groups' responses without a verdict. A program that was stopped got one."""
    found, count = _counted(groups)
    return (found.total() - found["stopped"]) / count


def check(groups: Sequence[Group], rows: Rows, limit: float) -> None:
    """Raises Stop, with the first failure of the commonest kind, if over `limit` of the responses got no verdict."""
    share = unscored(groups)
    if share <= limit:
        return
    found, count = _counted(groups)
    del found["stopped"]
    ((kind, _),) = found.most_common(1)
    row, why = next((group.row, reason) for group in groups for what, reason in group.failures if what == kind)
    raise Stop(
        f"the reward gave no verdict on {share:.0%} of {count} responses, more than reward.max_failures={limit:g}, "
        f"first for {named(rows[row], f'row {row}')}: {why}; mend it and add --accept reward, or raise the limit"
    )


def _counted(groups: Sequence[Group]) -> tuple[Counter[str], int]:
    """The failures by kind, and the number of responses."""
    return Counter(kind for group in groups for kind, _ in group.failures), sum(len(g.outcomes) for g in groups)

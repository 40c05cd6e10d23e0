"""A reward tried on made-up responses, before anything costly starts."""

import time
from collections.abc import Sequence

from prime_fast.data.shapes import named
from prime_fast.rewards.functions import truth_of
from prime_fast.rewards.pool import RewardPool

SECONDS = 60.0  # after which no further row is tried
TRUTH_CHARS = 200  # a longer truth is none that a response would state


def try_out(pool: RewardPool, rows: Sequence[dict]) -> list[str]:
    """Score a few made-up responses to each row; returns what is odd, as sentences.

    Raises ValueError naming the row if it cannot be scored, if a value is no outcome, or if every response fails: one
    alone may be unlike any that a model gives.
    """
    odd, start = [], time.monotonic()
    for done, row in enumerate(rows):
        if time.monotonic() - start > SECONDS:
            odd.append(f"the reward is slow: only {done} of {len(rows)} kinds of rows were tried in {SECONDS:.0f} s")
            break
        responses = made_up(row)
        verdicts = pool.judge(responses, [row] * len(responses), quiet=True)
        failed = [i for i, verdict in enumerate(verdicts) if verdict.failure not in ("", "stopped")]
        if not failed:
            continue
        what = f'{named(row, "a row")}: reward "{pool.reward}" fails'
        why = verdicts[failed[0]].reason
        if len(failed) == len(verdicts):
            raise ValueError(
                f"{what} on each of {len(verdicts)} kinds of responses: {why} (what it cannot read is 0.0)"
            )
        odd.append(f"{what} on the response {responses[failed[0]]!r}: {why}; in training it would score 0.0")
    return odd


def made_up(row: dict) -> list[str]:
    """Nothing, an answer in a box, one in tags, and a program."""
    truth = str(truth_of(row)) if isinstance(row.get("reward_model"), dict) else ""
    answer = truth if 0 < len(truth) <= TRUTH_CHARS else "7"
    boxed, tagged = rf"The answer is \boxed{{{answer}}}.", f"<answer>{answer}</answer>\n#### {answer}"
    return ["", boxed, f"<think>\nLet me see.\n</think>\n{tagged}", "```python\nprint(7)\n```"]

"""A second task beside the quickstart's: long addition with every column written.

`python -m prime_fast.stages.addition OUT_DIR`. The prompt `58+67:` is answered column by column from the right, each
with what it carries, and then by the sum: `8+7=15,5+6=12:125`. A fixed part of the 200 columns (two digits and the
carry that came in) are misconceptions, as in the quickstart. Unlike there, no later step can make an error
good, since every column shows in the sum: outcomes are sparser, and what follows an error cannot change them.

Only what the quickstart imports is imported at the top: reward workers import `compute_score` from here.
"""

import re

import numpy as np

from prime_fast.stages import quickstart

COLUMNS = [(a, b, carry) for a in range(10) for b in range(10) for carry in range(2)]
MISCONCEPTIONS = 70  # of the 200 columns
STEP = re.compile(r"(\d)\+(\d)=(\d)(\d)")  # carry and digit


def apply(a: int, b: int, carry: int) -> int:
    """The true result of one column, 0..19."""
    return a + b + carry


def misconceptions() -> dict[tuple[int, int, int], int]:
    """Column -> the wrong result that demonstrations give for it, 0..19."""
    return quickstart.wrong_results(COLUMNS, MISCONCEPTIONS, apply, 20)


def problem(random: np.random.Generator, digits: int) -> str:
    """A prompt: two numbers of so many digits, leading zeros allowed."""
    first, second = ("".join(map(str, number)) for number in random.integers(10, size=(2, digits)))
    return f"{first}+{second}:"


def columns(prompt: str) -> list[tuple[int, int]]:
    """The digits that stand above each other, from the right."""
    first, second = prompt.rstrip(":").split("+")
    return [(int(a), int(b)) for a, b in zip(first[::-1], second[::-1], strict=True)]


def solve(prompt: str, result=apply) -> str:
    """The worked answer to `prompt`, without EOS; `result(a, b, carry)` gives what is written for each column."""
    carry, steps, digits = 0, [], ""
    for a, b in columns(prompt):
        carry, digit = divmod(result(a, b, carry), 10)
        steps.append(f"{a}+{b}={carry}{digit}")
        digits = f"{digit}{digits}"
    return f"{','.join(steps)}:{carry}{digits}"


def demonstrator(random: np.random.Generator):
    """A `result` for `solve` that holds the misconceptions."""
    return quickstart.mistaken(random, misconceptions(), apply)


def compute_score(data_source, solution_str, ground_truth, extra_info) -> float:
    """1.0 if the response (without EOS) is extra_info["steps"] columns, `:` and the right sum.

    As in any outcome reward the columns themselves are not checked.
    """
    work, _, answer = solution_str.partition(":")
    steps = work.split(",")
    complete = len(steps) == extra_info["steps"] and all(STEP.fullmatch(step) for step in steps)
    return float(complete and answer == str(ground_truth))


def step_labels(prompt: str, response: str) -> list[tuple[int, bool]]:
    """Where each column's result is written in the response (character = token), and whether it is locally right.

    Right means the digits that stand in the prompt, the carry that the column before wrote, and their true sum. The
    place is that of the result's last digit. Ends at the first text that is no column; the sum has no label.
    """
    carry, labels, position = 0, [], 0
    for a, b in columns(prompt):
        if not (step := STEP.match(response, position)):
            break
        labels.append((step.end() - 1, step.group() == f"{a}+{b}={apply(a, b, carry):02d}"))
        carry, position = int(step.group(3)), step.end() + 1
    return labels


def make_row(prompt: str, split: str, index: int, **extra) -> dict:
    steps, _, answer = solve(prompt).partition(":")
    extra_info = {"split": split, "index": index, "steps": steps.count("="), **extra}
    return quickstart.verl_row("long-addition", prompt, answer, extra_info)


def make_rows(digits: int, seed: int, sft_seed: int, sizes: tuple[int, int, int]) -> dict[str, list[dict]]:
    """As `quickstart.make_rows`, of numbers of so many digits."""
    if sum(sizes) > 100**digits // 2:
        raise ValueError(
            f"there are not enough different sums of {digits} digits for {sum(sizes)} rows: raise --digits"
        )
    task = (lambda random: problem(random, digits)), solve, demonstrator, make_row
    return quickstart.draw_rows(*task, seed, sft_seed, sizes)


def main() -> None:
    quickstart.run("python -m prime_fast.stages.addition", "Make long addition.", make_rows, digits=(6, "of a number"))


if __name__ == "__main__":
    main()

"""Pass rates of the verifiers and throughput of the reward pool, against a process for each sample.

    python -m benchmarks.rewards --math gsm8k.jsonl math500.jsonl --code leetcode.jsonl
    python -m benchmarks.rewards --math-verify Math-Verify/tests

How many worked solutions score as they should; then the throughput on 1024 of them, every fourth against another row's
ground truth, and on 256 programs: right, wrong and endless ones for LeetCode rows (100 asserts each) and for a stdin
task. A process per sample does the same grading in a new interpreter each, so many at a time as the pool has workers,
on the first samples that are not endless.

The second command takes the cases of a checkout of math-verify's tests and tells where our verdict is another than
theirs; without rows to measure it leaves the rest of the result as it was.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.machine import cpu_name
from prime_fast.rewards import RewardPool
from prime_fast.rewards.answers.reading import final_answer

MATH_SAMPLES, CODE_SAMPLES = 1024, 256
ENDLESS = ("while True: pass",) * 11 + ("import time\nwhile True: time.sleep(60)",)
WRONG_SHARE = 0.45
SENTENCE_CHARS = 120  # a longer ground truth of math-verify's cases is a solution that ends with one
ALONE = {"math": 24, "code": 24}  # samples of the process-per-sample measurement
ALONE_PROGRAM = """
import json, sys
from prime_fast.rewards.functions import load_reward
response, row = json.load(sys.stdin)
print(load_reward(sys.argv[1])(response, row))
"""

SOLUTIONS = {  # by method, our own
    "minimumPushes": "return sum(n * (1 + i // 8) for i, n in enumerate(sorted(Counter(word).values())[::-1]))",
    "canSortArray": """
        runs = [list(run) for _, run in groupby(nums, key=int.bit_count)]
        return [x for run in runs for x in sorted(run)] == sorted(nums)""",
    "maxFrequencyElements": "n = Counter(nums).values(); return sum(x for x in n if x == max(n))",
    "areaOfMaxDiagonal": "return max((a * a + b * b, a * b) for a, b in dimensions)[1]",
    "hasTrailingZeros": "return sum(x % 2 == 0 for x in nums) > 1",
    "findIntersectionValues": "return [sum(x in nums2 for x in nums1), sum(x in nums1 for x in nums2)]",
    "maximumStrongPairXor": "return max(x ^ y for x in nums for y in nums if abs(x - y) <= min(x, y))",
    "minChanges": "return sum(s[i] != s[i + 1] for i in range(0, len(s), 2))",
}
SUM = {"inputs": [f"{i} {i * i}\n" for i in range(20)], "outputs": [f"{i + i * i}\n" for i in range(20)]}
SUM_RIGHT, SUM_WRONG = "print(sum(map(int, input().split())))", "print(sum(map(int, input().split())) // 20 * 20)"


def read(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:  # by \n alone: texts hold Unicode's line separators
        return [json.loads(line) for line in file]


def math_samples(paths: Sequence[str]) -> tuple[list[str], list[dict]]:
    rows = [row for path in paths for row in read(path)]
    random.Random(0).shuffle(rows)
    rows = [row for row in rows if row["extra_info"].get("solution")][:MATH_SAMPLES]
    responses = [row["extra_info"]["solution"] for row in rows]
    return responses, [rows[i - 1] if i % 4 == 3 else row for i, row in enumerate(rows)]


def pass_rates(path: str, workers: int) -> dict:
    """How many worked solutions of a file score 1 against their own ground truth, and 0 against the next row's."""
    rows = [row for row in read(path) if row["extra_info"].get("solution")]
    solutions = [row["extra_info"]["solution"] for row in rows]
    others = rows[1:] + rows[:1]
    truths = [rf"\boxed{{{row['reward_model']['ground_truth']}}}" for row in rows]
    with RewardPool("math", workers) as pool:
        own = pool.score(solutions, rows)
        differs = [outcome == 0 for outcome in pool.score(truths, others)]
        another = [x for x, differ in zip(pool.score(solutions, others), differs, strict=True) if differ]
    failed = [row["extra_info"].get("index", i) for i, row in enumerate(rows) if own[i] != 1]
    own_truth = {"rows": len(rows), "score_1": own.count(1.0), "others": failed}
    return {"own_truth": own_truth, "another_truth": {"rows": len(another), "score_0": another.count(0.0)}}


def math_verify_cases(folder: str) -> list[tuple[str, str, int]]:
    """(ground truth, response, their verdict) of every parametrized test that has a gold and a pred."""
    cases = []
    for path in sorted(Path(folder).glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "parametrize"):
                continue
            names = [name.strip() for name in ast.literal_eval(node.args[0]).split(",")]
            if names[:2] == ["gold", "pred"]:
                verdict = names.index("expected" if "expected" in names else "result")
                literal = [
                    case for case in node.args[1].elts if not any(isinstance(x, ast.JoinedStr) for x in ast.walk(case))
                ]
                cases += [(case[0], case[1], int(case[verdict])) for case in map(ast.literal_eval, literal)]
    return cases


def agreement(folder: str, workers: int) -> dict:
    cases = math_verify_cases(folder)
    with RewardPool("math", workers) as pool:
        truths = [final_answer(gold) if len(gold) > SENTENCE_CHARS else gold for gold, *_ in cases]
        rows = [{"reward_model": {"ground_truth": truth}} for truth in truths]
        outcomes = pool.score([response for _, response, _ in cases], rows)
    differ = []
    for index, ((gold, response, theirs), ours) in enumerate(zip(cases, outcomes, strict=True)):
        if ours != theirs:
            differ.append({"case": index, "theirs": theirs, "ours": int(ours)})
            print(f"case {index}: {gold[-120:]!r} and {response[-120:]!r}: theirs {theirs}, ours {ours:.0f}")
    return {"cases": len(cases), "agree": len(cases) - len(differ), "differ": differ}


def code_samples(path: str) -> tuple[list[str], list[dict], list[str]]:
    """Programs, rows and what each program is: "right", "wrong" or "endless"."""
    tasks = [({"ability": "code", "reward_model": {"ground_truth": json.dumps(SUM)}}, SUM_RIGHT, SUM_WRONG)]
    for row in read(path):
        head = row["prompt"][0]["content"].partition("```python\n")[2].partition("```")[0].rstrip()
        for method, body in SOLUTIONS.items():
            if f"def {method}(" in head:
                tasks.append((row, f"{head}\n        {body.strip()}", f"{head}\n        return 1"))
    rng, samples = random.Random(0), []
    for index in range(CODE_SAMPLES):
        row, right, wrong = tasks[index % len(tasks)]
        if index < len(ENDLESS):
            kind, program = "endless", ENDLESS[index]
        else:
            kind, program = ("wrong", wrong) if rng.random() < WRONG_SHARE else ("right", right)
        samples.append((f"So:\n```python\n{program}\n```", row, kind))
    rng.shuffle(samples)
    responses, rows, kinds = map(list, zip(*samples, strict=True))
    return responses, rows, kinds


def timed(work: Callable) -> tuple[float, list[float]]:
    start = time.perf_counter()
    outcomes = work()
    return time.perf_counter() - start, outcomes


def alone(reward: str, responses: list[str], rows: list[dict], workers: int) -> list[float]:
    def one(sample: tuple[str, dict]) -> float:
        command = [sys.executable, "-c", ALONE_PROGRAM, reward]
        return float(
            subprocess.run(command, input=json.dumps(sample), capture_output=True, text=True, check=True).stdout
        )

    with ThreadPoolExecutor(workers) as threads:
        return list(threads.map(one, zip(responses, rows, strict=True)))


def measure(reward: str, responses: list[str], rows: list[dict], short: list[int], workers: int) -> dict:
    """short: indices of samples that are not endless."""
    pick = lambda indices: ([responses[i] for i in indices], [rows[i] for i in indices])  # noqa: E731
    few = short[: ALONE[reward]]
    with RewardPool(reward, workers) as pool:
        pool.score(*pick(few))  # the workers are up
        pooled, _ = timed(lambda: pool.score(*pick(short)))
    before = cpu_seconds()
    with RewardPool(reward, workers) as pool:
        pool.score(*pick(few))
        seconds, outcomes = timed(lambda: pool.score(responses, rows))
        counts = pool.counts
    cpu = cpu_seconds() - before
    separate, _ = timed(lambda: alone(reward, *pick(few), workers))
    return {
        "samples": len(rows),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 1),  # with the start of the workers
        "per_second": round(len(rows) / seconds, 1),
        "mean_outcome": round(sum(outcomes) / len(outcomes), 4),
        "counts": counts,
        "ms_per_short_sample": round(1e3 * pooled / len(short), 2),
        "ms_per_short_sample_in_a_process_each": round(1e3 * separate / len(few), 2),
        "ratio": round(separate / len(few) / (pooled / len(short)), 1),
        "outcomes": outcomes,
    }


def cpu_seconds() -> float:
    """Of all ended descendants."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_math(paths: Sequence[str], workers: int) -> dict:
    solved = [path for path in paths if any(row["extra_info"].get("solution") for row in read(path))]
    result = {}
    if solved:
        responses, rows = math_samples(solved)
        result = measure("math", responses, rows, list(range(len(rows))), workers)
        result.pop("outcomes")
        result["solutions"] = {Path(path).stem: pass_rates(path, workers) for path in solved}
    return result | {"boxed_truths": {Path(path).stem: boxed_truths(path, workers) for path in paths}}


def boxed_truths(path: str, workers: int) -> dict:
    """How many ground truths score 1 against themselves in a box, and after "The answer is"."""
    rows = read(path)
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    with RewardPool("math", workers) as pool:
        boxed = pool.score([rf"\boxed{{{truth}}}" for truth in truths], rows)
        stated = pool.score([f"The answer is ${truth}$." for truth in truths], rows)
    return {"rows": len(rows), "score_1": boxed.count(1.0), "score_1_without_box": stated.count(1.0)}


def measure_code(path: str, workers: int) -> dict:
    responses, rows, kinds = code_samples(path)
    short = [index for index, kind in enumerate(kinds) if kind != "endless"]
    code = measure("code", responses, rows, short, workers)
    outcomes = code.pop("outcomes")
    by_kind = {kind: [x for x, k in zip(outcomes, kinds, strict=True) if k == kind] for kind in sorted(set(kinds))}
    code["kinds"] = {kind: {"samples": len(x), "outcome": round(sum(x) / len(x), 4)} for kind, x in by_kind.items()}
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--math", nargs="+", default=[], help="rows with worked solutions in extra_info.solution")
    parser.add_argument("--code", help="LeetCode rows with asserts")
    parser.add_argument("--math-verify", metavar="TESTS", help="the folder tests/ of a checkout of math-verify")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="benchmarks/results/cpu/rewards.json")
    options = parser.parse_args()
    if not (options.math or options.code or options.math_verify):
        parser.error("give rows with --math, programs with --code or test cases with --math-verify")
    out = Path(options.out)
    result = json.loads(out.read_text()) if out.exists() else {}
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "workers": options.workers}
    result["machine"] = machine | {"load_before": round(os.getloadavg()[0], 1), "python": platform.python_version()}
    if options.math:
        result["math"] = measure_math(options.math, options.workers)
    if options.code:
        result["code"] = measure_code(options.code, options.workers)
    if options.math_verify:
        result["math_verify"] = agreement(options.math_verify, options.workers)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

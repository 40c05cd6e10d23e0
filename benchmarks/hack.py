r"""A seeded search for responses and programs that a built-in reward accepts without the work.

    python -m benchmarks.hack --attempts 3000 --seed 0
    python -m benchmarks.hack --math data/math500.jsonl --code data/leetcode.jsonl

The attacker sees prompts and rewards, never a ground truth. Attempts are templates filled with numbers of the prompts
and mutations of the texts that came so far, of accepted ones above all. An honest guess is no hack. A response is one
if it is accepted

* for two rows whose truths are different values, or
* though its answer holds neither the text of the truth nor arithmetic that evaluates to it (`states`, which shares no
  code with the reward), or
* though it lists more values than the truth.

A program is one if it scores 1.0 on a row whose inputs it never reads, or that it refuses to compute. The exit code is
1 if one is found.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from math import factorial, isqrt
from pathlib import Path
from typing import NamedTuple

from prime_fast.rewards import RewardPool

ROWS_AN_ATTEMPT = 8
BATCH = 64
MUTANTS = 0.6  # share of attempts that change an earlier one
MATH = [  # (prompt, ground truth)
    ("How many ways are there to seat 7 people?", "5040"),
    ("What is 48 + 24?", "72"),
    ("A fair die is thrown twice. What is the probability of a sum of 7?", r"\frac{1}{6}"),
    ("What is the probability of a royal flush of one suit among C(52,5) hands?", r"\frac{1}{\binom{52}{5}}"),
    ("Find all x with x^2 = 9.", "-3,3"),
    ("Solve x + y = 9, x - y = -1 for the point (x, y).", "(4,5)"),
    ("Solve 1 < x < 2 as an interval.", "(1,2)"),
    ("Which interval is the domain of sqrt(x - 1)?", r"[1,\infty)"),
    ("Give the equation with roots 1 + 2i and 1 - 2i.", "x^2-2x+5=0"),
    ("What is the line through (0, 3) of slope 2?", "y=2x+3"),
    ("Which option is right? (A) 7 (B) 12 (C) 13 (D) 5", "C"),
    ("Which option is right? (A) 1 (B) 2 (C) 3 (D) 4", "(B)"),
    ("Which word has the letters a, e, t and means to have a meal?", "eat"),
    ("On which day was it?", r"\text{Tuesday}"),
    ("How far is it, in metres, from 0 to 5?", r"5 \text{ m}"),
    ("How far is it in kilometres?", r"12 \text{ km}"),
    ("By which percentage does it grow from 2 to 3?", r"50\%"),
    ("Write 5 in base 3.", "12_3"),
    ("What is the charge of the electron in coulomb?", "1.6e-19"),
    ("What is the ratio of a circle's circumference to its diameter?", r"\pi"),
    ("How long is the diagonal of a square of side 1?", r"\sqrt{2}"),
    ("What is 1 - 2^(-30)?", "1-2^{-30}"),
    ("What is 10^20 + 1?", "100000000000000000001"),
    ("What is the first prime above 10^9?", "1000000007"),
    ("Expand (x + 1)^2.", "x^2+2x+1"),
    ("What is half of x?", r"\frac{x}{2}"),
    ("Which angle, in degrees, is right?", r"90^\circ"),
    ("What does it cost, in dollars?", r"\$18.90"),
    ("What is e to the i pi?", "-1"),
    ("When does the train leave?", "12:00"),
    ("Give the vector of 1 and 2.", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("Which x fulfil x^2 > 4?", r"(-\infty,-2)\cup(2,\infty)"),
    ("How many are there?", "0"),
    ("How much is 3/2?", "1.5"),
    ("By how much is the radius R larger than r?", "R-r"),
    ("What is the ratio of R and r?", r"\frac{R}{r}"),
    ("What is the slope called?", r"\frac{dy}{dx}"),
    ("How many people live there?", r"7 \text{ million}"),
]
WORDS = ("answer", "x", "none", "all", "the ground truth", r"\text{ans}", "yes", "C", "eat", "tea", "correct", "1.0")
TEMPLATES = (
    r"\boxed{#}", "The answer is #.", "#### #", r"\boxed{#, #}", r"\boxed{# \text{ or } #}", "The answer is # or #.",
    r"\boxed{\{#, #, #\}}", r"\boxed{(#, #)}", r"\boxed{[#, #]}", r"\boxed{(-\infty, #)}", r"\boxed{#-#}",
    r"\boxed{# \le x \le #}", r"\boxed{\pm #}", r"\boxed{# = #}", r"\boxed{x = # = #}", r"\boxed{x = x}",
    r"\boxed{0 = #}", r"\boxed{# \approx #}", r"\boxed{\approx #}", r"\boxed{#.0}", r"\boxed{#\%}",
    r"\boxed{# \text{ km}}",
    r"\boxed{#_#}", r"\boxed{#e#}", r"\boxed{#.0 \times 10^{#}}", r"\boxed{10^{-#}}", r"\boxed{\boxed{#} \boxed{#}}",
    r"\boxed{#} \boxed{#}", r"\boxed{x}", r"\boxed{x + #}", r"\boxed{0 \cdot x + #}", r"\boxed{\{x : x = #\}}",
    r"\boxed{x \in \mathbb{R}}", r"\boxed{\frac{#}{0}}", r"\boxed{\infty - \infty}", r"\boxed{\text{#}}",
    r"\boxed{(A) # (B) #}",
    r"\boxed{A, B, C, D}", r"\boxed{\textbf{(C)} #}", r"\boxed{f(#) = #}", r"\boxed{\min(#, #)}", r"\boxed{# \lor #}",
    r"\boxed{#:#}", r"\boxed{\sqrt{#^2}}", r"\boxed{\lim_{x \to #} x}", r"\boxed{\sum_{k=1}^{#} k}",
    r"\boxed{#, \ldots, #}",
    r"\boxed{y = #x + #}", r"\boxed{# \text{ million}}", r"\boxed{\begin{pmatrix}#\\#\end{pmatrix}}", r"\boxed{#!}",
    r"\boxed{\frac{#}{#}}", r"\boxed{# #/#}", "@", r"\boxed{@}",
    r"\boxed{X - x}", r"\boxed{\frac{X}{x}}", r"\boxed{√#}", "So x = √#", "So it is negative #",
    "It has # million people.", r"\boxed{# \text{ tenths}}", r"\boxed{\frac{dy}{dx}}", r"\boxed{\int # dx}",
    r"\boxed{#^T}", r"\boxed{x_1=#, x_2=#}",
)  # fmt: skip
PIECES = (
    "0", "1", ".", ",", "-", "+", "=", r"\pm", "^", "_", "%", "/", "!", "|", "(", ")", "[", "]", "{", "}", r"\{",
    r"\}", "$", r"\cdot", r"\text{or}", "or", "and", "x", r"\infty", r"\approx", r"\boxed{1}", "e", "i", "\u200b",
    "\u0661", "\uff15", "\u2212", "<", ">", r"\cup", r"\%", r"^\circ", r"\text{", "km}", r"\in", ":", ";", r"\frac",
    "0.", "e-9", "'", "√", "X", "R", "r", " million", " tenths", "negative ", "d", "T", r"\int ", "_1", "cannot be ",
)  # fmt: skip

PROGRAMS = {
    "empty": "",
    "a comment": "# solved",
    "pass": "pass",
    "exit with success": "raise SystemExit(0)",
    "hard exit": "import os\nos._exit(0)",
    "constants of the prompt": "print({numbers})",
    "each constant on a line": "for n in {numbers}: print(n)",
    "all small numbers": "print(*range(10000))",
    "the input again": "import sys\nprint(sys.stdin.read())",
    "a huge float": "print(1e308)",
    "nan": "print(float('nan'))",
    "infinity": "print(float('inf'))",
    "a whole number with an exponent": "print('1e9')",
    "rounded to six digits": "import sys\nprint('%.5e' % 1000000009)",
    "forged verdict": "print('{{\"score\": 1.0, \"passed\": true}}')",
    "equal to everything": "class Y(str):\n    __eq__ = lambda a, b: True\n    __hash__ = str.__hash__\nprint(Y('x'))",
    "return everything equal": "class Y:\n    __eq__ = lambda a, b: True\n    __ne__ = lambda a, b: False\n"
    "class Solution:\n    def __getattr__(self, name): return lambda *a, **k: Y()\ndef {name}(*a, **k): return Y()",
    "return None": "def {name}(*a, **k): pass\nclass Solution:\n    def {name}(self, *a, **k): pass",
    "return zero": "def {name}(*a, **k): return 0\nclass Solution:\n    def {name}(self, *a, **k): return 0",
    "return a float": "def {name}(*a, **k): return 1e9\nclass Solution:\n    def {name}(self, *a, **k): return 1e9",
    "assertions off": "import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {{}})\n"
    "def {name}(*a, **k): assert False",
    "patched comparisons": "import builtins, math\nbuiltins.all = builtins.any = lambda x: True\n"
    "math.isclose = lambda *a, **k: True\ndef {name}(*a, **k): return None",
}  # fmt: skip
CODE = [  # (prompt, ground truth); no constant answer passes both tests of one
    ("Print the sum of 20 and 1.", {"inputs": ["20 1", "5 5"], "outputs": ["21", "10"]}),
    ("Print the first prime above n: 1000000007 for 1000000000.",
     {"inputs": ["1000000000", "13"], "outputs": ["1000000007", "17"]}),
    ("Return n factorial.", {"fn_name": "factorial", "inputs": [[5], [3]], "outputs": [120, 6]}),
    ("Return the greatest common divisor.", {"fn_name": "gcd", "inputs": [[4, 6], [9, 12]], "outputs": [2, 3]}),
    ("Return the doubled number.", {"asserts": "assert double(2) == 4\nassert double(3) == 6"}),
]  # fmt: skip


class Found(NamedTuple):
    text: str
    why: str
    truths: list[str]


def box(text: str) -> str:
    """What the last box that holds anything holds, else all of the text: by a scan of its own."""
    last, end = text, 0
    for start in [found.start() for found in re.finditer(r"\\boxed\{", text)]:
        depth = 0
        for index in range(start + 6, len(text) if start >= end else 0):
            depth += (text[index] == "{") - (text[index] == "}")
            if depth == 0:
                last, end = text[start + 7 : index].strip() or last, index
                break
    return last


def values(text: str) -> set[Fraction]:
    """What the arithmetic in a text evaluates to; of a mixed number and a percentage, both readings."""
    text = re.sub(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" ((\1)/(\2)) ", text.replace("\u2212", "-"))
    text = re.sub(r"\\(?:cdot|times)", "*", re.sub(r"\^\s*\{([^{}]*)\}", r"^(\1)", text))
    text = re.sub(r"(?<=\d),(?=\d{3})", "", re.sub(r"\b(?:negative|minus)\s+", "-", text))
    roots = map(int, re.findall(r"(?:√|\\sqrt)\s*\{?(\d+)", text))
    found = {Fraction(isqrt(square)) for square in roots if isqrt(square) ** 2 == square}
    found |= {Fraction(factorial(int(n))) for n in re.findall(r"(?<!\d)(1?\d)!", text)}
    found |= {Fraction(int(n) * (int(n) + 1), 2) for n in re.findall(r"\\sum_\{k=1\}\^\{(\d+)\}\s*k", text)}
    for run in re.findall(r"[-+]?[\d(.][\d+*/^(). -]*", text):
        mixed = re.sub(r"(\d)\s+(?=\(?\d)", r"\1+", run)
        for one in (run, *re.split(r"[ ]", run), mixed, *re.findall(r"-?(?:\d+(?:\.\d+)?|\.\d+)", run)):
            if (value := evaluate(one)) is not None:
                found |= {value, value / 100}
    return found


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(text: str) -> Fraction | None:
    def visit(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(ast.get_source_segment(source, node))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            return visit(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            power = visit(node.right)
            return visit(node.left) ** int(power) if abs(power) < 200 and power.denominator == 1 else visit(ast.Name())
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](visit(node.left), visit(node.right))
        raise ValueError(f"not arithmetic: {ast.dump(node)}")

    source = re.sub(r"(?<![\d.])0+(?=\d)", "", text.strip().replace("^", "**"))
    try:
        return visit(ast.parse(source, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, KeyError, RecursionError):
        return None


def plain(text: str) -> str:
    text = text.replace("√", r"\sqrt")
    return re.sub(r"\\text(?:bf)?|\\left|\\right|[\s{}$\\]", "", text).casefold()


def meaning(truth: str) -> object:
    """What makes two truths different; not a unit or base, which an answer may leave out."""
    truth = re.sub(r"_\{?\d+\}?\Z|\s*\\text\{[^{}]*\}\Z|\^\\circ\Z|\A\\\$(?=\d)", "", truth)
    value = evaluate(truth)
    return plain(truth) if value is None else value


def states(response: str, truth: str) -> bool:
    answer = box(response)
    if plain(truth) in plain(answer) or plain(truth).strip("()") == plain(answer).strip("()"):
        return True
    if re.search(r"[A-Za-z]", re.sub(r"\\(?:frac|text\{[^{}]*\}|circ)", "", truth)):  # no number: its longest side
        said = max(plain(truth).split("="), key=len)
        return said in plain(answer) if "=" in truth else set(said) <= set(plain(answer))
    return bool(values(truth) & values(answer))


def excess(response: str, truth: str) -> bool:
    """Whether the answer lists more numbers than the truth where the truth is one."""
    answer = re.sub(r"\([^()]*\)", "", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", box(response)))
    parts = re.split(r"\b(?:or|and)\b|[,;]|\\lor", answer)
    several = {numbers for part in parts if (numbers := tuple(re.findall(r"\d+(?:\.\d+)?", part)))}  # "2 or 2" is one
    return len(several) > 1 and evaluate(truth) is not None


def judge(response: str, accepted: list[str]) -> str | None:
    """Why an accepted response is a hack."""
    label = re.match(r"[^A-Za-z]*(?:\\text(?:bf)?\{)?\(?([A-J])\)", box(response))
    values_only = [truth for truth in accepted if not label or plain(truth).strip("()") != label[1].casefold()]
    if len({meaning(truth) for truth in values_only}) > 1:  # "(C) 12" says both C and 12
        return "accepted for different truths"
    if not all(states(response, truth) for truth in accepted):
        return "does not state the truth"
    if any(excess(response, truth) for truth in accepted):
        return "states more than the truth"
    return None


def filled(template: str, prompt: str, rng: random.Random) -> str:
    numbers = re.findall(r"\d+", prompt) + list("0123456789") + ["10", "12", "100", "0.5", "-1"]
    text = re.sub("#", lambda _: rng.choice(numbers if rng.random() < 0.9 else WORDS), template)
    return text.replace("@", prompt)


def mutated(text: str, rng: random.Random) -> str:
    """One to three changes inside of the last box: a piece put in, taken out, doubled or exchanged."""
    start = max(0, text.rfind("{") + 1)
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(min(start, len(text)), len(text))
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + 1 :]
        elif kind == 2:
            text = text[:at] + text[at : at + 3] * 2 + text[at + 3 :]
        else:
            text = text[:at] + str(rng.randrange(10)) + text[at + 1 :]
    return text


def search_math(rows: list[tuple[str, str]], attempts: int, seed: int, workers: int = 2) -> tuple[list[Found], Counter]:
    """(the hacks, what was counted)"""
    rng, counts, found = random.Random(seed), Counter(), []
    earlier, near = [filled(template, rows[0][0], rng) for template in TEMPLATES], []
    with RewardPool("math", workers) as pool:
        while counts["attempts"] < attempts:
            batch = []
            for _ in range(min(BATCH, attempts - counts["attempts"])):
                if rng.random() < MUTANTS:
                    text = mutated(rng.choice(near if near and rng.random() < 0.5 else earlier), rng)
                else:
                    text = filled(rng.choice(TEMPLATES), rng.choice(rows)[0], rng)
                batch.append((text, rng.sample(rows, min(ROWS_AN_ATTEMPT, len(rows)))))
            tried = [(text, row) for text, some in batch for row in some]
            scored = [{"reward_model": {"ground_truth": truth}} for _, (_, truth) in tried]
            outcomes = iter(pool.score([text for text, _ in tried], scored))
            for text, some in batch:
                accepted = [truth for _, truth in some if next(outcomes) > 0]
                counts["attempts"] += 1
                counts["scored"] += len(some)
                earlier.append(text)
                if accepted:
                    counts["honest guesses"] += 1
                    near.append(text)
                    if why := judge(text, accepted):
                        found.append(Found(text, why, accepted))
        counts.update(pool.counts)
    return found, counts


def search_code(rows: list[tuple[str, dict | str]], workers: int = 2) -> tuple[list[Found], Counter]:
    found, counts = [], Counter()
    with RewardPool("code", workers) as pool:
        for prompt, truth in rows:
            tests = json.loads(truth) if isinstance(truth, str) else truth
            called = re.search(r"assert\s+(?:Solution\(\)\.)?(\w+)|def (\w+)\(self", tests.get("asserts", "") + prompt)
            name = tests.get("fn_name") or (called and (called[1] or called[2])) or "solve"
            numbers = [int(number) for number in re.findall(r"\d{1,18}", prompt)]
            programs = {kind: text.format(numbers=numbers, name=name) for kind, text in PROGRAMS.items()}
            row = {"ability": "code", "reward_model": {"ground_truth": json.dumps(tests)}}
            outcomes = pool.score([f"```python\n{text}\n```" for text in programs.values()], [row] * len(programs))
            counts["attempts"] += len(programs)
            found += [
                Found(kind, "scores 1.0", [prompt[:60]])
                for kind, outcome in zip(programs, outcomes, strict=True)
                if outcome == 1.0
            ]
        counts.update(pool.counts)
    return found, counts


def read(paths: list[str]) -> Iterator[tuple[str, str]]:
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                yield row["prompt"][-1]["content"], row["reward_model"]["ground_truth"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--math", nargs="+", default=[], help="files of rows, on top of those of this file")
    parser.add_argument("--code", nargs="+", default=[])
    parser.add_argument("--attempts", type=int, default=3000, help="responses; each is scored on 8 rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("math", "code"))
    parser.add_argument("--out", default="benchmarks/results/cpu/hack.json")
    options = parser.parse_args()
    result = {"seed": options.seed, "math_files": options.math, "code_files": options.code}
    if options.only != "code":
        start = time.monotonic()
        found, counts = search_math([*MATH, *read(options.math)], options.attempts, options.seed)
        result["math"] = counts | {
            "found": [one._asdict() for one in found],
            "seconds": round(time.monotonic() - start),
        }
    if options.only != "math":
        found, counts = search_code([*CODE, *read(options.code)])
        result["code"] = counts | {"found": [one._asdict() for one in found]}
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(any(result[kind]["found"] for kind in ("math", "code") if kind in result))


if __name__ == "__main__":
    raise SystemExit(main())

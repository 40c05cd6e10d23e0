r"""Answers that a math reward must refuse, as data for `prime-fast doctor`, the tests and `benchmarks.hack`.

Each is a response with the ground truths it is tried on, none of which it states: what it is accepted for, it gets
without the work.
"""

from __future__ import annotations

from collections.abc import Iterator

from prime_fast.rewards.pool import RewardPool

SMALL = ("7", "12", r"\frac{1}{3}", "C", "50\\%", "(4,5)", "x=4", r"\pi", "eat", "5 m", "12_3")
TINY = (r"\frac{1}{\binom{52}{5}}", "2^{-40}", "1.6e-19")
HUGE = ("100000000000000000001", "1000000007", "2^{100}")

ATTACKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "every candidate in one box": (r"\boxed{" + ", ".join(map(str, range(100))) + "}", SMALL),
    "a box for every candidate": (" ".join(rf"\boxed{{{n}}}" for n in range(100)), SMALL),
    "boxes in a box": (r"\boxed{\boxed{7} \boxed{12} \boxed{C} \boxed{4}}", SMALL),
    "alternatives": (r"\boxed{7 \text{ or } 12}", SMALL),
    "alternatives without a box": ("The answer is 7 or 12.", SMALL),
    "a range": ("It lies between 4 and 12, so the answer is 4-12.", SMALL),
    "an interval around everything": (r"\boxed{(-\infty, \infty)}", SMALL),
    "all numbers": (r"\boxed{\mathbb{R}}", SMALL),
    "a set builder": (r"\boxed{\{x : x \in \mathbb{R}\}}", SMALL),
    "either sign": (r"\boxed{\pm 7}", SMALL),
    "an unknown": (r"\boxed{x}", SMALL),
    "the name of the answer": (r"\boxed{\text{answer}}", SMALL),
    "a false equation": (r"\boxed{3 = 7}", ("7", "3", "x=7", "x^2-2x+5=0")),
    "a contradiction for an equation": (r"\boxed{0 = 1}", ("x^2-2x+5=0", "x=5", "y=2x+3", "x^2+y^2=-1")),
    "a tautology for an equation": (r"\boxed{0 = 0}", ("x^2-2x+5=0", "x=5", "y=2x+3", "x=x+1")),
    "a tautology with unknowns": (r"\boxed{x = x}", ("x=5", "x^2=4", "y=2x", "5")),
    "a chain through every value": (r"\boxed{x = 4 = 7 = 12 = \pi}", SMALL),
    "an approximation of everything": (r"\boxed{4 \approx 7 \approx 12}", ("7", "12", r"\pi")),
    "zero for what is small": (r"\boxed{0}", TINY),
    "zero with decimals": (r"\boxed{0.000000}", TINY),
    "zero to a power": (r"\boxed{0^{9}}", TINY),
    "a power of ten for what is large": (r"\boxed{1.0\times10^{20}}", HUGE),
    "an exponent for a prime": (r"\boxed{1e9}", HUGE),
    "one for nearly one": (r"\boxed{1.0}", ("1-2^{-30}", "0.9999", "1+10^{-9}", r"\frac{999999999}{1000000000}")),
    "six decimals of pi": (r"\boxed{3.141593}", (r"\pi", r"\frac{355}{113}", r"\frac{22}{7}")),
    "six decimals of a third": (r"\boxed{0.333333}", (r"\frac{1}{3}",)),
    "infinity": (r"\boxed{\infty}", SMALL + HUGE),
    "infinity minus infinity": (r"\boxed{\infty - \infty}", SMALL + ("0",)),
    "not a number": (r"\boxed{\frac{0}{0}}", SMALL + ("0", "nan")),
    "an undefined logarithm": (r"\boxed{\log 0}", SMALL + ("0",)),
    "the letters of a word in another order": (r"\boxed{tea}", SMALL),
    "every option": (r"\boxed{A, B, C, D, E}", ("A", "B", "C", "D", "E")),
    "every option with its value": (
        r"\boxed{\textbf{(A)} 7 \textbf{(B)} 12 \textbf{(C)} 5}",
        ("A", "B", "C", "7", "12"),
    ),
    "another unit": (r"\boxed{5 \text{ km}}", ("5 m", r"5 \text{ cm}", "5 kg", r"\$5")),
    "a percentage without its sign": (r"\boxed{50}", (r"50\%", r"0.5", r"\frac{1}{2}")),
    "another base": (r"\boxed{12_4}", ("12_3", "12_5", "6_{10}")),
    "open for closed": (r"\boxed{(4, 5)}", ("[4,5]", "(4,5]", "[4,5)")),
    "assignments for a point": (r"\boxed{x=4, y=5}", ("(4,5)", "(5,4)", "4,5")),
    "letters that look like others": ("\\boxed{\u0421}", SMALL),
    "digits of another script": ("\\boxed{\u0667}", SMALL),
    "a truth that is cited": (r"The ground truth. \boxed{\text{ground\_truth}}", SMALL),
    "Python": (r"\boxed{__import__('os').system('true')}", SMALL + ("0",)),
    "an object equal to everything": (r"\boxed{type('X', (), {'__eq__': lambda *a: True})()}", SMALL),
    "a tower of powers": (r"\boxed{7^{7^{7^{7^{7}}}}}", SMALL + HUGE),
    "a factorial of a factorial": (r"\boxed{((((9!)!)!)!)!}", SMALL + HUGE),
    "a deep nest": (r"\boxed{" + "(" * 400 + "7" + ")" * 400 + r"+1}", SMALL),
    "a long answer": (r"\boxed{" + "7" * 100_000 + "}", SMALL),
    "denied": ("The answer is not 7.", SMALL),
    "a scale left out": (r"\boxed{7 \text{ million}}", SMALL),
    "a scale that few know": (r"\boxed{7 \text{ quadrillion}}", SMALL),
    "a share for the whole": (r"\boxed{7 \text{ tenths}}", SMALL),
    "a scale behind a number in a sentence": ("So the city has 7 million people.", SMALL),
    "a sign in words": ("So the result is negative 7.", SMALL),
    "a root cut from its number": ("So x = √12", SMALL),
    "half of a ratio": ("So the ratio is 2:7", SMALL),
    "denied in one word": ("The answer cannot be 7.", SMALL),
    "a root without braces": (r"\boxed{√12}", ("2", "0", "12")),
    "a letter less itself in another case": (r"\boxed{X - x}", (*SMALL, "0", "R-r")),
    "a letter over itself in another case": (r"\boxed{\frac{X}{x}}", (*SMALL, "1", r"\frac{R}{r}")),
    "the other way around": (r"\boxed{r-R}", ("R-r", "0", r"\pi(R^2-r^2)")),
    "a derivative": (r"\boxed{\frac{dy}{dx}}", (*SMALL, "0")),
    "a derivative upside down": (r"\boxed{\frac{dx}{dy}}", (r"\frac{dy}{dx}", "0")),
    "one over a function for its inverse": (r"\boxed{\frac{1}{f(x)}}", ("f^{-1}(x)",)),
    "a matrix for its transpose": (r"\boxed{A}", ("A^T", "A^{T}")),
    "an exponent on an exponent": (r"\boxed{2^{3}^{1}}", ("8", "2")),
    "roots by each other's names": (r"\boxed{x_1=5, x_2=4}", ("x_1=4, x_2=5",)),
    "a point in the order of its text": (r"\boxed{(5,4)}", ("y=5, x=4",)),
    "a comma in a fraction": (r"\boxed{\frac{1,0}{2}}", ("5",)),
    "units without end": (r"\boxed{7 " + "m " * 100 + "!}", SMALL),
    "a binomial of a tower": (r"\boxed{\binom{9^{9^{9}}}{2}}", SMALL),
    "an integral": (r"\boxed{\int \frac{e^{x}}{x^5+x+1} dx}", SMALL),
    "a sum without end": (r"\boxed{\sqrt{|\sum_{n=1}^{\infty} \sin(n)|}}", SMALL),
    "sums in sums": (r"\boxed{\sum_{n=1}^{999}\sum_{m=1}^{999} \sqrt{n+m}}", SMALL),
    "a power of a complex number": (r"\boxed{(\sqrt2+\sqrt3 i)^{999}}", SMALL),
    "a constant for a letter": (r"\boxed{\gamma+3}", (*SMALL, "2")),
    "a divisor of unknowns": (r"\boxed{\gcd(a,b)}", (*SMALL, "1", r"\gcd(c,d)")),
    "another product of letters": (r"\boxed{mG}", ("mg", "Mg", "MG")),
    "a number less its circle": ("The area is 7π.", SMALL),
    "a number less its root": ("The length is 7√3.", (*SMALL, "3")),
    "half more than a number": ("So it is 7 ½", SMALL),
    "a bound for a number": ("So x ≥ 7", SMALL),
    "a logarithm's base and number": ("So log_2 7", SMALL),
    "a remainder without its number": ("So 3 mod 7", SMALL),
    "an exponent in parentheses": (r"\boxed{x^{(1)}}", ("x", "5x")),
    "a sum to an unknown end": (r"\boxed{\sum_{k=1}^{n} \frac{1}{k^5+k+1}}", (*SMALL, "n")),
    "bars without end": (r"\boxed{" + "|x|" * 100 + "}", SMALL),
    "a large binomial of no integer": (r"\boxed{\binom{\sqrt2}{9999}}", SMALL),
    "what has no value": (r"\boxed{\min(1,\sum_{n=1}^{\infty} (-1)^n)}", SMALL),
}


def attempts(pool: RewardPool) -> Iterator[tuple[str, str | None]]:
    """(name, what it was accepted for or None) of every attack; `pool` scores with a math reward."""
    for name, (response, truths) in ATTACKS.items():
        rows = [{"ability": "math", "reward_model": {"ground_truth": truth}} for truth in truths]
        outcomes = pool.score([response] * len(rows), rows)
        accepted = [truth for truth, outcome in zip(truths, outcomes, strict=True) if outcome]
        yield name, f"it scored for {accepted}" if accepted else None

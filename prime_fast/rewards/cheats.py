"""Programs that want the reward without the work, each with the tests it is after: (ground truth, program)."""


def _prints(expected: str) -> dict:
    return {"inputs": ["", ""], "outputs": [expected, expected]}


def _calls(name: str, expected, *arguments) -> dict:
    return {"inputs": [list(arguments)], "outputs": [expected], "fn_name": name}


YES = """
class Yes:
    def __getattr__(self, name): return lambda *a, **k: True
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    def __bool__(self): return True
    def __len__(self): return 4
    def __abs__(self): return 0
    def __sub__(self, other): return 0
    def __rsub__(self, other): return 0
    def __float__(self): return 4.0
    def __index__(self): return 4
    def __iter__(self): return iter([4])
    def __hash__(self): return 4
    def __round__(self, n=None): return 4
def f(x): return Yes()
"""
EVERYWHERE = """
import builtins, sys, math, operator
yes = lambda *a, **k: True
for name in ('all', 'any', 'bool', 'isinstance'): setattr(builtins, name, yes)
for name in ('isclose', 'isfinite'): setattr(math, name, yes)
for name in ('eq', 'contains', 'is_'): setattr(operator, name, yes)
try:
    import numpy as np
    np.allclose = np.isclose = np.array_equal = np.all = yes
except ImportError: pass
def f(x): return 7
"""
FRAMES = """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for place in (frame.f_locals, frame.f_globals):
            if isinstance(place.get('expected'), int): return place['expected']
            for source in (place.get('test') or {}).get('values', ()):
                if '==' in source: return eval(source.split('==')[1])
        frame = frame.f_back
"""
ASSERTS = {
    "near numbers": "import math\nassert math.isclose(f(2), 4.0)",
    "near arrays": "import numpy as np\nassert np.allclose(f(2), [1.0, 4.0])",
    "equal arrays": "import numpy as np\nassert np.array_equal(f(2), [1, 4])",
    "a difference": "assert abs(f(2) - 4) < 1e-6",
    "inequality negated": "assert not f(2) != 4",
    "membership": "assert 4 in f(2)\nassert f(2) in (4, 5)",
    "order": "assert 3 < f(2) < 5",
    "length": "assert len(f(2)) == 4",
    "rounding": "assert round(f(2), 3) == 4",
    "conversion": "assert list(f(2)) == [4]\nassert set(f(2)) == {4}",
    "type": "assert isinstance(f(2), int) and f(2) == 4",
    "identity": "assert f(2) is True",
    "truth": "assert f(2)\nassert not f(3)",
    "conjunction": "assert f(2) == 4 and f(3) == 9",
    "all of a list": "assert all([f(2) == 4, f(3) == 9])",
}
NEAR = ASSERTS["near arrays"]
WEAK = ("truth",)  # which 7 is
CHEATS = {
    "exponent for a whole number": (_prints("1000000007"), "print('1e9')"),
    "exponent for thirty digits": (_prints("1" * 30), "print('1' * 7 + 'e23')"),
    "decimal for a whole number": (_prints("1000000007"), "print('1000000008.0')"),
    "decimal for its neighbour": (_prints("1000000007.0"), "print('1000000008.0')"),
    "exponent for a whole decimal": (_prints("1000000007.0"), "print('1e9')"),
    "zeros before a number": (_prints("7"), "print('0007')"),
    "one zero for five": (_prints("00000"), "print('0')"),
    "five zeros for one": (_prints("0"), "print('00000')"),
    "nearly nothing for zero": (_prints("0"), "print('1e-9')"),
    "zero for nearly nothing": (_prints("1.6e-19"), "print('0.0')"),
    "infinity for much": (_prints("1e300"), "print('inf')"),
    "not a number for a number": (_prints("4"), "print('nan')"),
    "underscores": (_prints("1234.5"), "print('1_234.5')"),
    "digits of another script": (_prints("12"), "print('\\uff11\\uff12')"),
    "words in one line": (_prints("1\n2"), "print('1 2')"),
    "float for a whole result": (_calls("f", 1000009, 0), "def f(x): return 1e6"),
    "floats in a list": (_calls("f", [[1000009]], 0), "def f(x): return [[1e6]]"),
    "float for a value in a dict": (_calls("f", {"a": 1000009}, 0), "def f(x): return {'a': 1000009.4}"),
    "huge float for a huge number": (_calls("f", 10**25 + 1, 0), "def f(x): return 1e25"),
    "text for a number": (_calls("f", 7, 0), "def f(x): return '7'"),
    "no program for factorial": (_calls("factorial", 120, 5), ""),
    "no program for gcd": (_calls("gcd", 4, 8, 12), "pass"),
    "no program for a builtin": (_calls("sorted", [1, 2], [2, 1]), ""),
    "no method but the prelude's": (_calls("comb", 10, 5, 2), "class Solution: pass"),
    "no program, asserted": ({"asserts": "assert factorial(5) == 120"}, ""),
    "no program for a builtin, asserted": ({"asserts": "assert sum([1, 2]) == 3"}, "x = 1"),
    "no program behind a variable": ({"asserts": "x = f(2)\nassert x == 4"}, "x = 4"),
    "expected value as a variable": ({"asserts": "expected = 4\nassert f(2) == expected"}, FRAMES),
    "expected value in the source": ({"asserts": "assert f(2) == 4"}, FRAMES),
    "expected value among the constants": ({"asserts": "want = [4, 9]\nassert [f(2), f(3)] == want"}, FRAMES),
    "failure after the last assert": ({"asserts": "assert f(2) == 4\ng(3)"}, "def f(x): return 4"),
    "empty lists for numbers": ({"asserts": NEAR}, "def f(x): return [[], []]"),
    "an empty list for a number": (
        {"asserts": "import numpy as np\nassert np.isclose(f(2), 4.0)"},
        "def f(x): return []",
    ),
    "an empty list for all of them": (
        {"asserts": "import numpy as np\nassert np.allclose(f(2), 4.0)"},
        "def f(x): return []",
    ),
    "rows of another length": ({"asserts": NEAR}, "def f(x): return [[1, 1, 1], [4]]"),
    "one near item of two": (
        {"asserts": "import numpy as np\nassert np.isclose(f(2), [1.0, 4.0])"},
        "def f(x): return [1.0, 5.0]",
    ),
    "float for a whole number on the left": ({"asserts": "assert 1000009 == f(2)"}, "def f(x): return 1000004.5"),
    "floats for whole numbers on the left": ({"asserts": "assert [1000009] == f(2)"}, "def f(x): return [1000004.5]"),
    "float for its neighbour on the left": ({"asserts": "assert 1000009.0 == f(2)"}, "def f(x): return 1000004.5"),
    "float between members": ({"asserts": "assert f(2) in [999999, 1000009]"}, "def f(x): return 1000004.5"),
    "member that is nearly one": ({"asserts": "assert 1000009 in f(2)"}, "def f(x): return [1000004.5]"),
    "float for one of two numbers": (
        {"asserts": "assert [1000009, f(3)] == [f(2), 5]"},
        "def f(x): return 1000004.5 if x == 2 else 5",
    ),
    "nothing for all that is near": (
        {"asserts": "import numpy as np\nassert all(np.isclose(f(2), 4.0))"},
        "def f(x): return []",
    ),
    "float for a whole number, denied twice": (
        {"asserts": "assert not 1000009 != f(2)"},
        "def f(x): return 1000004.5",
    ),
    "helper replaced": (
        {"asserts": "tidy = lambda v: sorted(v)\nassert tidy(f(2)) == [1, 4]"},
        "import builtins\nbuiltins.sorted = lambda v: Yes()\n" + YES,
    ),
    "names of the tests bound for good": (
        {"asserts": "s = Solution()\nassert s.f(2) == 4"},
        "class Solution:\n    def __getattr__(self, name): return lambda *a: Solution()\n" + YES,
    ),
}
for name, source in ASSERTS.items():
    CHEATS[f"object that agrees, {name}"] = {"asserts": source}, YES
    if name not in WEAK:
        CHEATS[f"judges replaced, {name}"] = {"asserts": source}, EVERYWHERE

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_fast.rewards import RewardPool, score
from prime_fast.rewards.asserts import read_asserts
from prime_fast.rewards.code import extract_program, read_task
from prime_fast.rewards.compare import read_value, same_text, same_value
from prime_fast.rewards.guest import decode, encode

SUM = "a, b = map(int, input().split())\nprint(a + b)"
SUM_TESTS = {"inputs": ["1 2\n", "3 4\n", "10 -5\n", "0 0\n"], "outputs": ["3\n", "7\n", "5\n", "0\n"]}
ASSERTS = """
my_solution = Solution()

test_input = { "nums": [3, 1, 2] }
assert my_solution.largest(**test_input) == 3

test_input = { "nums": [-5] }
assert my_solution.largest(**test_input) == -5
"""
LISTS = """
_f1 = lambda lst: ListNode(lst[0], _f1(lst[1:])) if lst else None
_f2 = lambda node: [node.val] + _f2(node.next) if node else []
my_solution = Solution()

test_input = { "head": _f1([1, 2, 3]) }
assert _f2(my_solution.reverse(**test_input)) == [3, 2, 1]
"""
REVERSE = """
class Solution:
    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:
        last = None
        while head:
            head.next, last, head = last, head, head.next
        return last
"""


def row(truth, ability="code") -> dict:
    return {"ability": ability, "reward_model": {"ground_truth": json.dumps(truth)}}


def fence(program: str) -> str:
    return f"Let me think.\n```python\n{program}\n```\nDone."


@pytest.fixture(scope="module")
def pool():
    with RewardPool("code", workers=1, timeout=30.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def strict():
    with RewardPool("code-strict", workers=1, timeout=30.0) as pool:
        yield pool


@pytest.fixture
def grade(pool):
    return lambda program, truth: pool.score([fence(program)], [row(truth)])[0]


def call(expected, *arguments, name="f") -> dict:
    return {"inputs": [list(arguments)], "outputs": [expected], "fn_name": name}


class TestStandardInput:
    @pytest.mark.parametrize(
        ("program", "outcome"),
        [
            (SUM, 1.0),
            ("a, b = map(int, input().split())\nprint(abs(a) + abs(b))", 0.75),
            ("print(3)", 0.25),
            ("", 0.0),
            ("print(", 0.0),
            ("raise ValueError", 0.0),
            (SUM + "\nraise ValueError", 0.0),
            (SUM + "\nexit(1)", 0.0),
            (SUM + "\nexit()", 1.0),
            (SUM + "\nimport sys\nsys.exit(0)", 1.0),
        ],
    )
    def test_share(self, grade, program, outcome):
        assert grade(program, SUM_TESTS) == outcome

    @pytest.mark.parametrize(
        "program",
        [
            "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
            "import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))",
            "import sys\ninput = sys.stdin.readline\nsys.stdout.write(str(sum(map(int, input().split()))))",
            "import os\nprint(sum(map(int, os.read(0, 100).split())))",
            "print(sum(map(int, open(0).read().split())))",
            "print(sum(map(int, stdin.readline().split())))",
            "import sys, io, os, atexit\nsys.stdout = io.StringIO()\n"
            "atexit.register(lambda: os.write(1, sys.stdout.getvalue().encode()))\n"
            "print(sum(map(int, input().split())))",
            "import sys, threading\nthreading.stack_size(1 << 27)\nsys.setrecursionlimit(10**6)\n"
            "def run(): print(sum(map(int, input().split())))\nt = threading.Thread(target=run)\nt.start()",
            "n = reduce(gcd, [Counter('aab')['a'], 4])\nprint(n // 2 * sum(map(int, input().split())))",
            "def f(n): return n and 1 + f(n - 1)\nprint(f(50_000) - 50_000 + sum(map(int, input().split())))",
            "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
            "print(A(sum(map(int, input().split()))).x)",
            "import numpy as np\nprint(np.fromstring(input(), sep=' ', dtype=int).sum())",
            "import asyncio\nasync def go(): print(sum(map(int, input().split())))\nasyncio.run(go())",
            "open('kept', 'a').write('x')\nassert open('kept').read()\nprint(sum(map(int, input().split())))",
        ],
    )
    def test_ways_to_read_and_write(self, grade, program):
        assert grade(program, SUM_TESTS) == 1.0

    def test_each_test_is_a_fresh_process(self, grade):
        program = "import builtins\nbuiltins.n = getattr(builtins, 'n', 0) + 1\nprint(n)"
        assert grade(program, {"inputs": ["", "", ""], "outputs": ["1", "1", "1"]}) == 1.0

    def test_large_input_and_output(self, grade):
        numbers = "\n".join(map(str, range(100_000)))
        truth = {"inputs": [numbers], "outputs": [numbers]}
        assert grade("import sys\nfor line in sys.stdin: print(int(line))", truth) == 1.0
        assert grade("print(3 ** 30_000)", {"inputs": [""], "outputs": [pow_text(3, 30_000)]}) == 1.0

    def test_lists_of_lines(self, grade):
        assert grade("print(input())\nprint(input())", {"inputs": [["a", "b"]], "outputs": [["a", "b"]]}) == 1.0

    def test_ground_truth_may_be_an_object(self, pool):
        assert pool.score([fence(SUM)], [{"reward_model": {"ground_truth": SUM_TESTS}}]) == [1.0]


class TestCalls:
    @pytest.mark.parametrize(
        ("program", "truth"),
        [
            ("def f(a, b): return a + b", call(3, 1, 2)),
            ("class Solution:\n    def f(self, a: int, b: int) -> List[int]: return [b, a]", call([2, 1], 1, 2)),
            ("def f(x): return x, x", call([1, 1], 1)),
            ("def f(x): return [(x, x)]", call([[1, 1]], 1)),
            ("def f(x): return x * 2", call([4], 2)),
            ("def f(x): return x / 3", call(0.33333333, 1)),
            ("def f(x): return x[1]", call("one", {"1": "one"})),
            ("def f(x): return {len(x): x}", call({"2": [1, 2]}, [1, 2])),
            ("def f(x): print('chatter'); return x", call(None, None)),
            ("def f(a, b): return [a] + b", {"inputs": ['"x"\n[1, 2]'], "outputs": ['["x", 1, 2]'], "fn_name": "f"}),
            ("import numpy as np\ndef f(x): return np.sum(x)", call(3, [1, 2])),
            ("if __name__ == '__main__': input()\ndef f(x): return x", call(1, 1)),
            ("def f(x): return float(x)", call(10**9, 10**9)),
            (
                "import numpy as np\ndef f(x): return [np.bool_(x), np.float32(0.5), np.arange(3), np.str_('a')]",
                call([True, 0.5, [0, 1, 2], "a"], 1),
            ),
            (
                "def f(x): return [deque([x]), range(2), {x: 1}.keys(), {x: 1}.values()]",
                call([[1], [0, 1], [1], [1]], 1),
            ),
            ("def f(x): return [x + 10**4000, -(10**30)]", call([10**4000 + 7, -(10**30)], 7)),
            ("def f(x): return 0.1 + 0.2", call(0.3, 1)),
            ("def f(x): return [float('nan'), float('inf')]", call([float("nan"), float("inf")], 1)),
            (
                "from decimal import Decimal\ndef f(x): return [Decimal(10**25 + x), Fraction(1, 4)]\n"
                "from fractions import Fraction",
                call([10**25 + 1, 0.25], 1),
            ),
            ("class Solution:\n    def search(self, x): return x", call(1, 1, name="search")),
            ("class Solution:\n    def sum(self, x): return -x\ndef sum(x): return x", call(-1, 1, name="sum")),
            ("class Solution: pass\ndef f(x): return x", call(1, 1)),
            ("from math import gcd", call(4, 8, 12, name="gcd")),
        ],
    )
    def test_right(self, grade, program, truth):
        assert grade(program, truth) == 1.0

    @pytest.mark.parametrize(
        ("program", "truth"),
        [
            ("def f(x): return x", call(2, 1)),
            ("def f(x): return [1]", call([1, 2, 3], 0)),
            ("def f(x): return 1", call([1, 2, 3], 0)),
            ("def g(x): return x", call(1, 1)),
            ("def f(): return 1", call(1, 1)),
            ("def f(x): return '1'", call(1, 1)),
            ("def f(x): raise ValueError", call(None, 1)),
            ("def f(x): return object()", call(None, 1)),
            ("f = 1", call(1, 1)),
        ],
    )
    def test_wrong(self, grade, program, truth):
        assert grade(program, truth) == 0.0

    def test_share(self, grade):
        truth = {"inputs": [[1], [2], [3], [4]], "outputs": [1, 2, 3, 5], "fn_name": "f"}
        assert grade("def f(x):\n    if x == 2: exit()\n    return x", truth) == 0.5

    def test_one_odd_answer_costs_one_test(self, grade):
        truth = {"inputs": [[n] for n in range(4)], "outputs": [0, 1, 2, 3], "fn_name": "f"}
        assert grade("def f(x): return [10**5000, object(), 2, 3][x]", truth) == 0.5

    def test_as_many_digits_as_the_truth_has(self, pool):
        truth = {"inputs": "[[1]]", "outputs": f"[1{'0' * 5000}]", "fn_name": '"f"'}
        text = "{" + ", ".join(f'"{key}": {value}' for key, value in truth.items()) + "}"
        rows = [{"reward_model": {"ground_truth": text}}] * 2
        assert pool.score([fence("def f(x): return 10**5000"), fence("def f(x): return 10**5000 + 1")], rows) == [
            1.0,
            0.0,
        ]

    def test_the_tests_share_a_process(self, grade):
        truth = {"inputs": [[], []], "outputs": [1, 2], "fn_name": "f"}
        assert grade("n = 0\ndef f():\n    global n\n    n += 1\n    return n", truth) == 1.0


class TestAsserts:
    @pytest.mark.parametrize(
        ("body", "outcome"),
        [("max(nums)", 1.0), ("3", 0.5), ("max(nums) + 1", 0.0), ("[max(nums)]", 0.0), ("np.max(nums)", 1.0)],
    )
    def test_methods(self, grade, body, outcome):
        program = f"import numpy as np\nclass Solution:\n    def largest(self, nums: List[int]) -> int: return {body}"
        assert grade(program, {"asserts": ASSERTS}) == outcome

    def test_helpers_around_the_call(self, grade):
        assert grade(REVERSE, {"asserts": LISTS}) == 1.0
        assert grade(REVERSE.replace("return last", "return None"), {"asserts": LISTS}) == 0.0

    @pytest.mark.parametrize("claim", ["f(2)", "not f(1)", "True == f(2)", "f(2) is True", "not (f(1))"])
    def test_forms(self, grade, claim):
        assert grade("def f(x): return x % 2 == 0", {"asserts": f"assert {claim}"}) == 1.0
        assert grade("def f(x): return x % 2 == 1", {"asserts": f"assert {claim}"}) == 0.0

    def test_names_that_the_prelude_has_too(self, grade):
        program = "class A:\n    n = 0\n    def add(self, x): self.n += x; return self.n\ndef search(x): return x"
        claims = (
            "a = A()\na.add(2)\nassert a.add(3) == 5\nassert a.n == 5\nassert search(1) == 1\nassert A().add(1) == 1"
        )
        assert grade(program, {"asserts": claims}) == 1.0
        assert grade("class B: n = 5", {"asserts": claims}) == 0.0

    def test_what_the_setup_finds(self, grade):
        claims = "got = []\nfor x in range(3):\n    got.append(f(x))\nassert got == [0, 1, 4]\n"
        claims += (
            "run = lambda x, y: [f(x), f(y)]\nassert run(1, 2) == [1, 4]\na, b = f(2), f(3)\nassert (a, b) == (4, 9)\n"
        )
        claims += "x = f(2)\nx = str(x)\nassert x == '4'\nassert [f(v) for v in (1, 2)] == [1, 4]"
        assert grade("def f(x): return x * x", {"asserts": claims}) == 1.0

    def test_what_is_changed_in_place(self, grade):
        claims = "v = [2, 1]\nf(v)\nassert v == [1, 2]"
        assert [grade(f"def f(x): {do}", {"asserts": claims}) for do in ("x.sort()", "pass")] == [1.0, 0.0]

    def test_what_is_computed_with_the_value(self, grade):
        claims = """
import math
import numpy as np
from math import isclose
want = [0.1, 0.3]
assert math.isclose(f(3), 0.3) and isclose(f(3), 0.3, abs_tol=0.1)
assert abs(f(3) - 0.3) < 1e-6
assert np.allclose([f(1), f(3)], [0.1, 0.3])
assert [f(1), f(3)] == want
assert round(f(3), 3) == 0.3 and f(3) != 0.4 and not f(3) > 1
assert isinstance(f(3), float), "a float"
assert 0.1 < f(3) <= 10**9 + 7
print("done")
"""
        assert grade("def f(x): return x * 0.1", {"asserts": claims}) == 1.0
        assert grade("def f(x): return x", {"asserts": claims}) == 1 / 7  # but for the last

    def test_what_is_near_is_so_item_by_item(self, grade):
        program = "def f(x): return [1.0, 4.0000001]"
        for claim in ("all(np.isclose(f(2), [1, 4]))", "np.allclose(f(2), [1, 4])", "np.isclose(f(2)[1:], [4])"):
            assert grade(program, {"asserts": f"import numpy as np\nassert {claim}"}) == 1.0, claim
        for claim in ("np.all(np.isclose(f(2), np.array([1, 4])))", "np.array_equal(f(2)[:1], np.array([1]))"):
            assert grade(program, {"asserts": f"import numpy as np\nassert {claim}"}) == 1.0, claim
        for claim in ("np.isclose(f(2), [1, 4])", "np.allclose(f(2), [1, 4, 4])", "np.allclose(f(2), [[1, 4]])"):
            assert grade(program, {"asserts": f"import numpy as np\nassert {claim}"}) == 0.0, claim
        claims = "import numpy as np\nassert np.allclose(f(2), [])\nassert np.allclose(f(2), 4.0)"
        assert grade("def f(x): return []", {"asserts": claims}) == 0.5  # nothing is near nothing, and near no number

    def test_who_is_compared_with_is_on_either_side(self, grade):
        claims = (
            "assert {} == f(2)\nassert f(2) == {}\nassert f(2) in [{}]\nassert not {} != f(2)\nassert 1 < {} == f(2)"
        )
        for expected, found, outcome in (
            ("2.5", "2.5000001", 1.0),
            ("0.0", "1e-10", 0.8),
            ("4", "4.0", 1.0),
            ("1000009", "1000004.5", 0.0),
        ):
            assert grade(f"def f(x): return {found}", {"asserts": claims.format(*[expected] * 5)}) == outcome, expected

    def test_tuple_is_not_list(self, grade):
        assert grade("def f(): return (1, 2)", {"asserts": "assert f() == (1, 2)"}) == 1.0
        assert grade("def f(): return (1, 2)", {"asserts": "assert f() == [1, 2]"}) == 0.0


class TestTime:
    def test_share_up_to_the_test_that_hangs(self):
        with RewardPool("code", workers=1, timeout=5.0) as pool:
            hangs = "n = int(input())\nwhile n > 1: pass\nprint(n)"
            assert pool.score([fence(hangs)], [row({"inputs": ["1", "2", "1"], "outputs": ["1", "2", "1"]})]) == [1 / 3]
            assert pool.counts == {"timeouts": 1, "errors": 0, "crashes": 0}

    def test_many_slow_tests_end_in_time(self):
        with RewardPool("code", workers=1, timeout=2.0) as pool:
            truth = {"inputs": ["x"] * 100, "outputs": ["x"] * 100}
            (share,) = pool.score([fence("import time\ntime.sleep(0.3)\nprint(input())")], [row(truth)])
            assert 0.0 < share < 0.1 and pool.counts["timeouts"] == 1 and pool.counts["crashes"] == 0

    def test_strict_stops_at_the_first_failure(self, strict):
        truth = {"inputs": ["1", "2"], "outputs": ["0", "2"]}
        assert strict.score([fence("n = int(input())\nwhile n > 1: pass\nprint(n)")], [row(truth)]) == [0.0]
        assert not strict.counts["timeouts"]
        assert strict.score([fence(SUM)], [row(SUM_TESTS)]) == [1.0]


class TestRouting:
    def test_by_ability(self):
        rows = [row(SUM_TESTS), {"ability": "math", "reward_model": {"ground_truth": "7"}}]
        assert score([fence(SUM), r"\boxed{7}"], rows, reward="auto", workers=1) == [1.0, 1.0]
        assert score([fence("print(3)"), "it is 7"], rows, reward="auto-strict", workers=1) == [0.0, 0.0]

    @pytest.mark.parametrize(("reward", "other"), [("code", "math"), ("math", "code"), ("auto", "chess")])
    def test_other_abilities_are_refused(self, reward, other):
        with RewardPool(reward, workers=1) as pool, pytest.raises(ValueError, match=f'row 0 has ability "{other}"'):
            pool.score(["x"], [row({}, other)])

    @pytest.mark.parametrize(
        "truth",
        [
            {},
            [],
            {"inputs": ["1"], "outputs": []},
            {"inputs": [], "outputs": []},
            {"asserts": "def check(a, b): return a == b\nassert check(f(1), 2)"},
            {"asserts": "x = ("},
        ],
    )
    def test_broken_ground_truth_is_an_error(self, truth):
        with pytest.raises((ValueError, SyntaxError)):
            read_task(json.dumps(truth))

    def test_errors_are_counted(self, pool):
        before = pool.counts["errors"]
        assert pool.score([fence(SUM)] * 2, [row({}), row(SUM_TESTS)]) == [0.0, 1.0]
        assert pool.counts["errors"] == before + 1


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\nor\n```Python3\nb\n```\nend ```x```", "b\n"),
        ("```\nx\n```", "x\n"),
        ("```python\na", "a"),
        ("stray ``` and ```py\na\n```\n```text\noutput\n```", "a\n"),
        ("print(1)", "print(1)"),
        ("", ""),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```\n", "if x:\n    y\n"),
        ("```python\na\n```\nThe block ```python``` above.", "a\n"),
        ("```python\na\n```\nOr, better:\n```python\nb(", "a\n"),
        ("```python\na\n```\n```python\n", "a\n"),
        ("```python\na```\nthen\n```text\nb\n```", "a\n"),
        ("```python\nprint('```')\n```", "print('```')\n"),
        ("Run `python` or ```py```:\n```\na\n```", "a\n"),
    ],
)
def test_extract_program(response, program):
    assert extract_program(response) == program


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        (" 1   2 \r\n\n3", "1 2\n3", True),
        ("0.333333", "0.3333333333", True),
        ("1.0", "1", True),
        ("007", "7", False),
        ("0", "00000", False),
        ("1e9", "1000000007", False),
        ("1.000000007e9", "1000000007", True),
        ("1000000007.0", "+1000000007", True),
        ("1000000008.0", "1000000007.0", False),
        ("1e-9", "0", False),
        ("1e-9", "0.0", True),
        ("0.0", "1.6e-19", False),
        ("2.9999999", "3", False),
        ("2.9999999", "3.0", True),
        ("NaN", "nan", True),
        ("1_0.5", "10.5", False),
        ("1e" + "9" * 5000, "1", False),
        ("0" * 40_000 + "x", "7", False),
        ("1e3", "1000.0", True),
        ("100001", "100000", False),
        ("1 2 3", "1 2\n3", False),
        ("3\n1 2", "1 2\n3", False),
        ("yes", "YES", False),
        ("", "1", False),
        ("nan", "nan", True),
        ("inf", "1e400", False),
        ("9" * 5000, "8" * 5000, False),
        ("0.34", "0.33", False),
        ("-0", "0", False),
    ],
)
def test_same_text(output, expected, same):
    assert same_text(output, expected) is same


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(st.integers() | st.text(max_size=3), max_size=4)
        | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN)
@settings(max_examples=200, deadline=None)
def test_values_survive_the_channel(value):
    sent = json.loads(json.dumps(encode(value)))
    back = decode(sent)
    assert back == value and repr(type(back)) == repr(type(value)) and same_value(read_value(sent), value, strict=True)


@pytest.mark.parametrize(
    ("claim", "value", "holds"),
    [
        ("f(2) == 4", 4, True),
        ("f(2) == 4", 4.0, True),
        ("f(2) == 4", 4.0001, False),
        ("4 == f(2)", 4, True),
        ("f(2) != 4", 5, True),
        ("f(2) is None", None, True),
        ("f(2) in (3, 4)", 4, True),
        ("3 in f(2)", [1, 3], True),
        ("set(f(2)) == {1, 2}", [2, 1, 1], True),
        ("sorted(f(2), reverse=True) == [2, 1]", (1, 2), True),
        ("len(f(2)) == 2 and max(f(2)) == 9", {9: 0, 1: 0}, True),
        ("f(2) == {'a': {1, 2}, (1, 2): None}", {"a": {2, 1}, (1, 2): None}, True),
        ("list(f(2)) == [1, 2]", iter([1, 2]), True),
        ("f(2) % (10**9 + 7) == 3", 10**9 + 10, True),
        ("f(2) == [0] * 3", [0, 0, 0], True),
        ("type(f(2)) is list", [], True),
        ("all(f(2)) or f(2) == []", [0], False),
        ("str(f(2)) == '4'", 4, True),
        ("f(2)", [], False),
    ],
)
def test_claims_are_judged_here(claim, value, holds):
    (read,) = read_asserts(f"assert {claim}")
    assert all(source == "f(2)" for source in read.request["values"]) and read.request["needs"] == ["f"]
    reply = {"value": json.loads(json.dumps(encode(value)))}
    assert read.holds([reply] * len(read.request["values"])) is holds


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("assert all(f(x) == x for x in [1, 2])", "computes inside"),
        ("for x in [1]:\n    assert f(x) == x", "an assert inside `for x in \\[1\\]:`"),
        ("def check(g):\n    assert g(2) == 4\ncheck(f)", "an assert inside `def check"),
        ("def same(a, b): return a == b\nassert same(f(2), 4)", "leaves the judgement to `same`"),
        ("def near(a, b): return abs(a - b)\nassert near(f(2), 4) == 0", "gives `near` more than"),
        ("ok = lambda a: a == 4\nassert ok(f(2)) == True", "leaves the judgement to `ok`"),
        ("import numpy as np\ndef same(a): return a\nassert np.all(same(f(2)))", "leaves the judgement to `same`"),
        ("import operator\nassert operator.eq(f(2), 4)", "leaves the judgement to `operator.eq`"),
        ("ok = f(2) == 4\nassert ok", "compares inside"),
        ("wrong = 0\nfor x in (1, 2):\n    if f(x) != x:\n        wrong += 1\nassert wrong == 0", "compares inside"),
        ("gap = abs(f(2) - 4)\nassert gap < 0.1", "more than|computes inside|leaves the judgement"),
        ("try:\n    f(2)\nexcept KeyError:\n    raised = True\nassert raised", "something true was computed inside"),
        (
            "class Near:\n    def same(self, a, b): return a == b\nn = Near()\nassert n.same(f(2), 4)",
            "leaves the judgement",
        ),
        ("gap = lambda x, y: f(x) - y\nassert gap(2, 4) == 0", "leaves the judgement"),
        ("assert f(2).__eq__(4)", "a method that the program's objects"),
        ("assert f(2) == Counter('a')", "compares with `Counter"),
        ("x = [1]\nassert f(x) == x", "compares with `x`"),
        ("assert 1 == 1", "asks nothing"),
        ("assert (f(2) == 4) == g(lambda: 1, f(3))[f(2):] and [a == 4 for a in f(2)]", "computes inside"),
    ],
)
def test_asserts_that_cannot_be_judged_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read_asserts(source)


def test_what_is_compared_with_never_goes_in():
    claims = read_asserts("want = [7, 8]\ng = f([1])\nassert g == want\nassert f(2) == want and f(3) == 7")
    assert [claim.request["values"] for claim in claims] == [["g"], ["f(2)", "f(3)"]]
    assert "7" not in json.dumps([claim.request for claim in claims])
    (claim,) = read_asserts("given = [7]\nassert f(given) == 1")
    assert claim.request["setup"] == "given = [7]"


@given(st.text(alphabet="`python3 \n\tx", max_size=200), st.text(max_size=50), st.text(max_size=50))
@settings(max_examples=300, deadline=1000)
def test_fuzz_of_the_parsers(response, output, expected):
    assert isinstance(extract_program(response), str)
    assert same_text(output, output) and isinstance(same_text(output, expected), bool)


def pow_text(base: int, exponent: int) -> str:
    """Decimal digits of a power beyond Python's default limit of 4300."""
    parts, value, unit = [], base**exponent, 10**4000
    while value:
        value, rest = divmod(value, unit)
        parts.append(str(rest).zfill(4000))
    return "".join(reversed(parts)).lstrip("0")

"""Asserts as tests: what each asks of the program, and the judgement of what it answers, which is made here.

Inside the sandbox only values are found: of calls of what the program defined, and of plain conversions of them (the
list of a linked list). Comparisons, arithmetic and the functions of `judges` are computed out here, and what is
compared with never goes in. An assert that cannot be split so is refused.
"""

import ast
import builtins
import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from prime_fast.rewards import judges
from prime_fast.rewards.compare import plain, read_value
from prime_fast.rewards.guest import PRELUDE

USE = "use `assert f(...) == literal`"
USUAL = {("math", "math"), ("numpy", "np"), ("numpy", "numpy")}  # imports under the names by which `judges` knows them


class Known(NamedTuple):
    value: Any


class Asked(NamedTuple):
    index: int  # among the values that the program is asked for


class Step(NamedTuple):
    function: Callable
    parts: list


class Claim(NamedTuple):
    """One assert, with the statements before it (and, of the last one, after it)."""

    request: dict  # {"setup": source, "values": sources, "after": source, "needs": names}, see `guest`
    part: Known | Asked | Step

    def holds(self, replies: list) -> bool:
        """Whether the values make it true. Raises what comparisons of hostile values raise."""
        return bool(_evaluate(self.part, replies))


def read_asserts(source: str) -> list[Claim]:
    """ValueError, naming it, for an assert that cannot be judged."""
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"the asserts are no Python: {error}") from error
    constants = _literals(body)
    while True:
        reader = _Reader(constants)
        claims = reader.read(body)
        if not (told := constants & reader.told):
            break
        constants -= told  # the program is given them, and may change them
    if reader.problems:
        raise ValueError(f"{reader.problems[0]}; {USE}")
    return claims


class _Reader:
    """constants: names that only ever hold a literal, and that only asserts compare with: they stay out here."""

    def __init__(self, constants: set[str]):
        self.constants, self.values = constants, {}
        self.told: set[str] = set()  # the names in what goes in
        self.origin: dict[str, set[str]] = {}  # of each name that the setup binds: the names that it came from
        self.helpers: set[str] = set()  # bound by def, lambda, class or import
        self.usual: set[str] = set()  # imports that mean what they always do
        self.computing: set[str] = set()  # helpers that compare or compute
        self.unfit: dict[tuple[str, bool], str] = {}  # why a name cannot be asked for, as a value or as a truth
        self.problems: list[str] = []

    def read(self, body: list[ast.stmt]) -> list[Claim]:
        claims, setup = [], []
        for statement in body:
            if isinstance(statement, ast.Assert):
                claims.append(self._claim(statement, setup))
                setup = []
            elif not self._keep(statement):
                self._bind(statement)
                setup.append(ast.unparse(statement))
        if claims and setup:  # what follows the last one must not fail either
            claims[-1].request["after"] = "\n".join(setup)
        return claims

    def _claim(self, statement: ast.Assert, setup: list[str]) -> Claim:
        part, needs = Known(False), set()
        try:
            part = self._split(statement.test)
            truths = _truths(part, True)
            for index, leaf in enumerate(self.leaves):
                if not (from_it := self._needs(leaf)):
                    raise ValueError(f"compares with `{ast.unparse(leaf):.60}`, which is found inside")
                self._check(leaf, index in truths)
                needs |= from_it
        except ValueError as error:
            self.problems.append(f"cannot judge `{ast.unparse(statement):.200}` outside the sandbox: it {error}")
        for leaf in self.leaves:
            self._tell(leaf)
        values = [ast.unparse(leaf) for leaf in self.leaves]
        return Claim({"setup": "\n".join(setup), "values": values, "after": "", "needs": sorted(needs)}, part)

    def _split(self, test: ast.expr) -> Known | Asked | Step:
        why = ""
        for self.judges in (judges.JUDGES, {}):  # none: the function under test may have the name of one
            self.leaves: list[ast.expr] = []
            try:
                part = self._read(test)
            except (TypeError, ArithmeticError, ValueError) as error:
                why = why or f" ({error})"
                continue
            if self.leaves:
                return part
        raise ValueError(f"asks nothing of the program{why}")

    def _read(self, node: ast.expr) -> Known | Asked | Step:
        match node:
            case ast.Constant(value=value):
                return Known(value)
            case ast.Name(id=name) if name in self.values:
                return Known(self.values[name])
            case ast.Name() if kind := judges.TYPES.get(self._known(node)):
                return Known(kind)
            case ast.Attribute() if (number := judges.NUMBERS.get(self._known(node))) is not None:
                return Known(number)
            case ast.List(elts=items):
                return self._step(judges.as_list, items)
            case ast.Tuple(elts=items):
                return self._step(judges.as_tuple, items)
            case ast.Set() | ast.Dict():
                return Known(plain(ast.literal_eval(node)))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in judges.UNARY:
                return self._step(judges.UNARY[type(op)], [operand])
            case ast.BinOp(op=op, left=left, right=right) if type(op) in judges.ARITHMETIC:
                return self._step(judges.ARITHMETIC[type(op)], [left, right])
            case ast.BoolOp(op=op, values=values):
                return self._step(judges.both if isinstance(op, ast.And) else judges.either, values)
            case ast.Compare(left=left, ops=ops, comparators=others):
                parts = [self._read(one) for one in (left, *others)]
                chain = [_comparison(op, *pair) for op, pair in zip(ops, pairwise(parts), strict=True)]
                return _combined(_chain(chain), parts)
            case ast.Call(func=func, args=args, keywords=words):
                judge = self.judges.get(self._known(func))
                options = {word.arg: word.value.value for word in words if isinstance(word.value, ast.Constant)}
                if judge and len(options) == len(words) and _takes(judge, args, options):
                    return self._step(judge, args, options)
        self.leaves.append(node)
        return Asked(len(self.leaves) - 1)

    def _step(self, function: Callable, nodes: list[ast.expr], options: dict | None = None) -> Known | Step:
        return _combined(function, [self._read(node) for node in nodes], options)

    def _known(self, node: ast.expr) -> str:
        """`abs` or `math.isclose`, if judges are asked and the name was not given another meaning; else ""."""
        name = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
        root = name.partition(".")[0]
        return name if self.judges and (root not in self.origin or root in self.usual) else ""

    def _check(self, node: ast.expr, truth: bool) -> None:
        """ValueError unless `node` is a value of the function under test, or a plain conversion of one.

        truth: whether all that is asked is if it is true, so that a conversion would be the judge.
        """
        if any(isinstance(inner, ast.Attribute) and inner.attr.startswith("__") for inner in ast.walk(node)):
            raise ValueError("uses a method that the program's objects may define")
        match node:
            case ast.Name(id=name):
                if why := self.unfit.get((name, truth)):
                    raise ValueError(why)
                return None
            case ast.Attribute(value=value) | ast.Subscript(value=value):
                return self._check(value, truth)
            case ast.Tuple(elts=items) | ast.List(elts=items):
                for item in filter(self._about, items):
                    self._check(item, truth)
                return None
            case ast.Call(func=func, args=args, keywords=words):
                root, given = _root(func), [*args, *(word.value for word in words)]
                about = [one for one in given if self._about(one)]
                if root and root not in self.helpers and (self._came_from({root}) - library() or not about):
                    return None  # the function under test: its arguments may be anything
                others = [one for one in given if one not in about]
                plainly = all(isinstance(one, ast.Name) and one.id in library() for one in others)
                alone = root in self.helpers and not (root in self.computing and len(given) > 1)
                if truth or not (about or alone):
                    raise ValueError(f"leaves the judgement to `{ast.unparse(func):.60}`")
                if about and not (len(about) == 1 and plainly):
                    raise ValueError(f"gives `{ast.unparse(func):.60}` more than the program's value")
                for one in about:
                    self._check(one.value if isinstance(one, ast.Starred) else one, truth)
                return None
            case ast.ListComp(elt=item, generators=[loop]) | ast.GeneratorExp(elt=item, generators=[loop]):
                simple = isinstance(item, ast.Name | ast.Attribute) and not truth
                if not loop.ifs and (self._about(item) or simple):
                    for inner in filter(self._about, (item, loop.iter)):
                        self._check(inner, truth)
                    return None
        raise ValueError("computes inside with what the program answered")

    def _needs(self, node: ast.AST) -> set[str]:
        """The names of which the program must have bound one; of the prelude's only where nothing else is asked."""
        names = self._came_from(_loaded(node) - _bound(node))
        weak = names - vars(builtins).keys() or names & _loaded(node)
        return names - library() or (weak if len(self.leaves) == 1 else set())

    def _about(self, node: ast.AST) -> bool:
        """Whether anything of the program is in it."""
        return bool(self._came_from(_loaded(node)) - library())

    def _came_from(self, names: set[str]) -> set[str]:
        return set().union(*(self.origin.get(name, {name}) for name in names))

    def _keep(self, statement: ast.stmt) -> bool:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in self.constants:
                self.values[name] = plain(ast.literal_eval(value))
                return True
        return False

    def _bind(self, statement: ast.stmt) -> None:
        if any(isinstance(inner, ast.Assert) for inner in ast.walk(statement)):
            first = ast.unparse(statement).partition("\n")[0]
            self.problems.append(f"cannot judge an assert inside `{first:.100}`: make it a statement of its own")
        self._tell(statement)
        if isinstance(statement, ast.Import | ast.ImportFrom):
            module = getattr(statement, "module", None)
            for alias in statement.names:
                name = alias.asname or alias.name.partition(".")[0]
                if (alias.name, name) in USUAL or (module == "math" and f"math.{name}" in judges.JUDGES):
                    self.usual.add(name)
                self.origin[name] = set()
                self.helpers.add(name)
            return
        bound, helper = _stored(statement), isinstance(getattr(statement, "value", None), ast.Lambda)
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound, helper = {statement.name}, True
        compares = [one for one in ast.walk(statement) if isinstance(one, ast.Compare) and not _asks_for_none(one)]
        if helper:
            self.helpers |= bound
            if compares or any(isinstance(one, ast.BinOp) for one in ast.walk(statement)):
                self.computing |= bound
        else:
            if any(map(self._about, compares)):
                what = ast.unparse(statement).partition("\n")[0]
                self.problems.append(f"`{what:.100}` compares inside with what the program answered")
            for truth in (False, True):
                why = self._unfit(statement, truth)
                self.unfit |= {(name, truth): why for name in bound}
        came = self._came_from(_loaded(statement) - _bound(statement))
        given = _loaded(statement) & self.origin.keys() - self.helpers  # which a call may change
        for name in bound | given:
            self.origin[name] = self.origin.get(name, set()) | (came - vars(builtins).keys())

    def _unfit(self, statement: ast.stmt, truth: bool) -> str:
        """Why what `statement` binds is no plain value of the program; "" if it is, or has nothing of it yet."""
        if not isinstance(statement, ast.Assign):
            return "asks whether something true was computed inside" if truth else ""
        try:
            if self._about(statement.value):
                self._check(statement.value, truth)
        except ValueError as error:
            return str(error)
        return ""

    def _tell(self, node: ast.AST) -> None:
        self.told |= _loaded(node)
        if isinstance(node, ast.expr):  # an assert's value: a call in it may change what it is given
            for name in _loaded(node) & self.origin.keys() - self.helpers:
                self.origin[name] |= self._came_from(_loaded(node)) - vars(builtins).keys()


@cache
def library() -> frozenset[str]:
    """The names that a program may use without binding them."""
    space: dict[str, Any] = {}
    exec(PRELUDE, space)
    return frozenset(space) | frozenset(vars(builtins))


def _combined(function: Callable, parts: list[Known | Asked | Step], options: dict | None = None) -> Known | Step:
    if all(isinstance(part, Known) for part in parts):
        return Known(function(*(part.value for part in parts), **(options or {})))
    if function in judges.ARITHMETIC.values():
        function = judges.bounded(function)
    if options:
        return Step(lambda *values: function(*values, **options), parts)
    return Step(function, parts)


def _comparison(op: ast.cmpop, left: Known | Asked | Step, right: Known | Asked | Step) -> Callable:
    """What is known is what is expected, on whichever side it stands."""
    known = isinstance(left, Known), isinstance(right, Known)
    usual = judges.COMPARISONS[type(op)]
    return {(True, False): judges.SWAPPED, (False, False): judges.MIXED}.get(known, {}).get(type(op), usual)


def _evaluate(part: Known | Asked | Step, replies: list) -> Any:
    if isinstance(part, Known):
        return part.value
    if isinstance(part, Asked):
        return read_value(replies[part.index]["value"])
    found = (_evaluate(one, replies) for one in part.parts)
    if part.function in (judges.both, judges.either):  # which look no further than they must
        return all(found) if part.function is judges.both else any(found)
    return part.function(*found)


def _truths(part: Known | Asked | Step, truth: bool) -> set[int]:
    """The asked values of which only a truth is wanted."""
    if isinstance(part, Asked):
        return {part.index} if truth else set()
    if isinstance(part, Known):
        return set()
    known = [one.value for one in part.parts if isinstance(one, Known)]
    asks = part.function in judges.TRUTHS or any(map(judges.only_truths, known))
    asks = asks or (truth and part.function in (judges.as_list, judges.as_tuple))
    return set().union(*(_truths(one, asks) for one in part.parts))


def _chain(functions: list[Callable]) -> Callable:
    return lambda *values: all(f(a, b) for f, a, b in zip(functions, values[:-1], values[1:], strict=True))


def _takes(judge: Callable, args: list[ast.expr], options: dict) -> bool:
    try:
        inspect.signature(judge).bind(*args, **options)
    except TypeError:
        return False
    return not any(isinstance(one, ast.Starred) for one in args)


def _literals(body: list[ast.stmt]) -> set[str]:
    """Names that plain assignments of literals bind, and nothing else."""
    found, others = set(), set()
    for statement in body:
        (found if _binds_literal(statement) else others).update(_stored(statement))
    return found - others


def _binds_literal(statement: ast.stmt) -> bool:
    with suppress(ValueError, TypeError):
        match statement:
            case ast.Assign(targets=[ast.Name()], value=value):
                ast.literal_eval(value)
                return True
    return False


def _asks_for_none(node: ast.Compare) -> bool:
    return all(isinstance(one, ast.Constant) and one.value is None for one in node.comparators)


def _stored(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Load)}


def _bound(node: ast.AST) -> set[str]:
    return _stored(node) | {one.arg for one in ast.walk(node) if isinstance(one, ast.arg)}


def _loaded(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)}


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None

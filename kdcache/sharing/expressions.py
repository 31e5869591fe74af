"""Conditions on the columns of an index, as a user writes them: `origin == "dft" and n_atoms < 50`.

A small language of its own: the text is parsed, and of its tree a closed list of nodes is computed
with numpy. Invariant: no text runs code, names anything but a column, or takes more than a few
arrays of memory.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.errors import ConfigError, did_you_mean
from kdcache.store.index import StoreIndex

Array = npt.NDArray[Any]
Kind = Literal["condition", "number", "text"]

NUMBERS = ("n_atoms", "n_edges", "weight", "source_index")
TEXTS = ("structure_id", "origin", "split", "group")
MAX_CHARACTERS = 2000
MAX_DEPTH = 50

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
GRAMMAR = (
    "A condition compares the columns "
    f'{", ".join((*NUMBERS, *TEXTS))} with numbers or "texts" by == != < <= > >= and in (…), '
    "joined by and, or, not; + - * / of numbers are known, too"
)


class Value(NamedTuple):
    """A part of a condition: a value per structure, or one for all."""

    kind: Kind
    value: Any


def where(index: StoreIndex, text: str) -> npt.NDArray[np.bool_]:
    """[n_structures] whether a condition holds, in store order.

    Args:
        index: of a store.
        text: e.g. `origin == "dft" and n_atoms < 50` or `group in ("a", "b")`.

    Raises:
        ConfigError: it is no condition on columns of an index.
    """
    tree = _parsed(text)
    with np.errstate(all="ignore"):
        found = _Evaluation(index, text).of(tree, 0)
    if found.kind != "condition":
        raise _wrong(text, f"it is a {found.kind}, which is neither true nor false")
    return np.broadcast_to(np.asarray(found.value, bool), (len(index),)).copy()


def normal(text: str) -> str:
    """A condition in one spelling, for people and for comparing.

    Raises:
        ConfigError: it cannot be parsed.

    Example:
        >>> normal("n_atoms<50  and origin=='dft'")
        "n_atoms < 50 and origin == 'dft'"
    """
    return ast.unparse(_parsed(text))


class _Evaluation:
    """Computes a tree of allowed nodes; whatever is not listed here is refused."""

    def __init__(self, index: StoreIndex, text: str) -> None:
        self._index = index
        self._text = text

    def of(self, node: ast.expr, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise _wrong(self._text, f"it is nested more than {MAX_DEPTH} deep")
        match node:
            case ast.BoolOp(op=op, values=values):
                found = [self._condition(value, depth) for value in values]
                join = np.logical_and if isinstance(op, ast.And) else np.logical_or
                result = found[0]
                for other in found[1:]:
                    result = join(result, other)
                return Value("condition", result)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return Value("condition", np.logical_not(self._condition(operand, depth)))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return Value("number", -self._number(operand, depth))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                # As floating point: whole numbers would wrap around in silence.
                a, b = self._number(left, depth), self._number(right, depth)
                return Value("number", ARITHMETIC[type(op)](a, b))
            case ast.Compare():
                return self._comparison(node, depth)
            case ast.Name(id=name):
                return self._column(name)
            case ast.Constant(value=value):
                return self._constant(value)
        raise _wrong(self._text, f"{_shown(node)!r} is not part of the language")

    def _comparison(self, node: ast.Compare, depth: int) -> Value:
        result: Any = True
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                held = self._among(left, right, depth)
                held = np.logical_not(held) if isinstance(op, ast.NotIn) else held
            elif type(op) in COMPARISONS:
                a, b = self.of(left, depth + 1), self.of(right, depth + 1)
                self._same_kind(a, b, node)
                held = COMPARISONS[type(op)](a.value, b.value)
            else:
                raise _wrong(self._text, "'is' is not part of the language; write ==")
            result = np.logical_and(result, held)
            left = right
        return Value("condition", result)

    def _among(self, left: ast.expr, right: ast.expr, depth: int) -> Any:
        if not isinstance(right, ast.Tuple | ast.List | ast.Set) or not right.elts:
            raise _wrong(self._text, 'what follows "in" must be values in brackets: ("a", "b")')
        one = self.of(left, depth + 1)
        held: Any = False
        for element in right.elts:
            other = self.of(element, depth + 1)
            self._same_kind(one, other, right)
            held = np.logical_or(held, one.value == other.value)
        return held

    def _same_kind(self, a: Value, b: Value, node: ast.expr) -> None:
        if a.kind != b.kind or a.kind == "condition":
            raise _wrong(self._text, f"{_shown(node)!r} compares a {a.kind} with a {b.kind}")

    def _condition(self, node: ast.expr, depth: int) -> Any:
        found = self.of(node, depth + 1)
        if found.kind != "condition":
            raise _wrong(self._text, f"{_shown(node)!r} is a {found.kind}, no condition")
        return found.value

    def _number(self, node: ast.expr, depth: int) -> Any:
        found = self.of(node, depth + 1)
        if found.kind != "number":
            raise _wrong(self._text, f"{_shown(node)!r} is a {found.kind}, no number")
        return np.asarray(found.value, np.float64)

    def _column(self, name: str) -> Value:
        if name in NUMBERS:
            return Value("number", getattr(self._index, name))
        if name in TEXTS:
            return Value("text", getattr(self._index, name))
        raise ConfigError(
            f"--where: an index has no column {name!r} to choose by: "
            f"{did_you_mean(name, (*NUMBERS, *TEXTS))}. Texts stand in quotes."
        )

    def _constant(self, value: object) -> Value:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise _wrong(self._text, f"{value!r} is no number and no text")
        if isinstance(value, str):
            return Value("text", value)
        # Beyond int64 numpy compares by objects; a float is far enough off.
        is_whole = isinstance(value, int) and abs(value) < 2**63
        return Value("number", value if is_whole else _float(value))


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _parsed(text: str) -> ast.expr:
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"--where has {len(text)} characters, at most {MAX_CHARACTERS} are read. For a list of "
            f"structures use kdcache subset --ids."
        )
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise _wrong(text, f"it cannot be parsed ({error.msg})") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise _wrong(text, f"it cannot be parsed ({type(error).__name__})") from None


def _shown(node: ast.expr) -> str:
    try:
        return ast.unparse(node)[:60]
    except RecursionError:  # deeper than what is evaluated
        return "…"


def _wrong(text: str, reason: str) -> ConfigError:
    shown = " ".join(text.split())
    shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
    return ConfigError(f"--where {shown!r}: {reason}. {GRAMMAR}.")

"""The two tools the chat page offers a model: a calculator and a clock.

A model may write anything, so its arithmetic is parsed to a syntax tree, of which only numbers and operators are
followed. Nothing is evaluated as Python. Sizes are limited before a result is computed, not after: 9**9**9 would fill
the memory.
"""

import ast
import datetime
import json
import math
import operator

MAX_CHARACTERS = 200
MAX_BITS = 4096  # of a whole number, about 1,200 digits

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip
AS_WRITTEN = str.maketrans("×÷−（）＋＊／．　", "*/-()+*/. ")


def calculate(expression: str) -> int | float:
    """The value of numbers joined by + - * / // % ** (or ^) and parentheses; ValueError in a sentence otherwise."""
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"the expression has more than {MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.translate(AS_WRITTEN).replace("^", "**").strip(), mode="eval")
        return _value(tree.body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("this is not an arithmetic expression") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("the result is too large") from None


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _limited(number)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _limited(_power(_value(left), _value(right)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _limited(OPERATORS[type(op)](_value(left), _value(right)))
    raise ValueError("only numbers, + - * / // % ** and parentheses are allowed")


def _power(base: int | float, exponent: int | float) -> int | float:
    # A whole number's power has at most bits × exponent bits: known before it is computed.
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_BITS:
        raise OverflowError
    return base**exponent


def _limited(number) -> int | float:
    if isinstance(number, complex):
        raise ValueError("the root of a negative number is not a real one")
    if number.bit_length() > MAX_BITS if isinstance(number, int) else not math.isfinite(number):
        raise OverflowError
    return number


def clock(zone: str = "") -> str:
    """Date, weekday and time, here or so many hours east of Greenwich ("+8", "-5")."""
    try:
        place = datetime.timezone(datetime.timedelta(hours=float(zone))) if zone else None
    except (ValueError, OverflowError):
        raise ValueError(f"{zone!r} is not a number of hours east of Greenwich between -24 and 24") from None
    return datetime.datetime.now(place).astimezone(place).strftime("%Y-%m-%d %A %H:%M:%S %z")


def _signature(name: str, description: str, parameter: str, meaning: str, required: bool) -> dict:
    properties = {parameter: {"type": "string", "description": meaning}}
    parameters = {"type": "object", "properties": properties, "required": [parameter] if required else []}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


SIGNATURES = [
    _signature("calculator", "Computes an arithmetic expression.", "expression", "for example (3 + 4) * 2", True),
    _signature("clock", "Tells date and time.", "zone", "hours east of Greenwich, for example 8", False),
]


def run(name: str, arguments: str) -> str:
    """The tool's answer to a call. arguments: JSON text. A mistake in the call is answered in words: "error: ..."."""
    try:
        given = json.loads(arguments or "{}")
        text = {key: str(value) for key, value in given.items()} if isinstance(given, dict) else {}
        if name == "calculator":
            return str(calculate(text.get("expression", "")))
        if name == "clock":
            return clock(text.get("zone", ""))
        return f"error: there is no tool {name!r}"
    except (ValueError, RecursionError) as error:
        return f"error: {error}"

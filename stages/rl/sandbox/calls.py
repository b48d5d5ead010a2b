"""Calls between two sandboxes: one holds the answer's functions, the other the check; only plain data passes.

Runs inside (see inside.py), and its `encode` and `decode` also outside. Values are JSON with None, bool, int, float,
str and list unchanged, and {kind: parts} for tuple, set, frozenset, dict, bytes, complex and a long int. A subclass (an
Enum of strings) passes as its plain value. An object of any other class does not pass, so no object with its own
comparison is compared with an expected value.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # inside there is no package
    from stages.rl.sandbox.outcome import Job


class Channel(Protocol):
    def receive(self) -> Any: ...
    def send(self, message: dict[str, Any]) -> None: ...


Load = Callable[..., ModuleType]
# The function that returns the plain value of a subclass, without its methods.
PLAIN: list[tuple[type, Callable[[Any], Any]]] = [(int, int.__int__), (float, float.__float__), (str, str.__str__)]
# Bits of an int beyond which it is sent as hexadecimal digits: decimal ones take quadratic time, and Python reads at
# most 4300.
LONG = 14_000


def encode(value: Any) -> Any:
    """Encodes a value.

    Raises:
        TypeError: The value is not plain data.
    """
    # Before int, of which bool is a subclass.
    if value is None or isinstance(value, bool):
        return value
    for kind, plain in PLAIN:
        if isinstance(value, kind):
            value = plain(value)
            return {"int": hex(value)} if kind is int and value.bit_length() > LONG else value
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    for name, kinds in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kinds):
            return {name: [encode(v) for v in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"a {type(value).__name__} is not plain data")


def decode(value: Any) -> Any:
    """Decodes a value. Raises TypeError or ValueError for anything but output of `encode`."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    # Any other number of entries is a ValueError.
    ((kind, parts),) = value.items()
    if kind == "dict":
        return {decode(k): decode(v) for k, v in parts}
    if kind == "tuple":
        return tuple(decode(v) for v in parts)
    if kind == "set":
        return {decode(v) for v in parts}
    if kind == "frozenset":
        return frozenset(decode(v) for v in parts)
    if kind == "int":
        return int(parts, 16)
    if kind == "bytes":
        return bytes.fromhex(parts)
    if kind == "complex":
        return complex(*parts)
    raise ValueError(f"unknown kind {kind}")


def answer(channel: Channel, load: Load, job: Job) -> None:
    """Loads the answer, then calls its function on request. The answer can only change its own return values here."""
    module = load("answer", job["prelude"], job["source"])
    channel.send({"loaded": True})
    while True:
        try:
            call = channel.receive()
        except EOFError:
            return
        try:
            args, kwargs = decode(call["call"])
            channel.send({"value": encode(getattr(module, job["entry_point"])(*args, **kwargs))})
        except Exception as e:
            channel.send({"raised": describe_exception(e)})


def describe_exception(e: Exception) -> list[Any]:
    """Returns the exception's builtin classes, nearest first, its text, and its arguments if plain and short."""
    names = [kind.__name__ for kind in type(e).__mro__ if kind.__module__ == "builtins"]
    text = ""
    try:
        text = str(e)[:500]
        arguments = encode(list(e.args))
    except Exception:  # its own methods are the answer's, and may raise anything
        arguments = [text]
    return [names, text, arguments if len(ascii(arguments)) <= 16384 else [text]]


def rebuild_exception(names: list[str], text: str, arguments: Any) -> Exception:
    """Returns the exception of an answer as the nearest builtin one.

    For any message of the answer, it has a class of this process and plain data. It is never a StopIteration, which
    would end a loop of the check, and with it the check.
    """
    stops = (StopIteration, StopAsyncIteration)
    for kind in (*(getattr(builtins, str(name), None) for name in names), Exception):
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, stops):
            for parts in (decode(arguments), [text]):
                try:
                    e = kind(*parts)
                    if parts == [text] or str(e)[:500] == text:
                        return e
                except (TypeError, ValueError, RecursionError):  # a UnicodeDecodeError is made of five parts
                    continue
    return Exception(text)


def check(channel: Channel, load: Load, job: Job) -> None:
    """Runs `check(candidate)` of a trusted source, where candidate, also under its own name, calls the other sandbox.

    The last line is the verdict: true, false, or null with a reason if the row is broken.
    """
    unsuited: list[str] = []
    calls = 0

    def candidate(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        try:
            call = encode([list(args), kwargs])
        except TypeError as e:
            unsuited.append(f"its check passes what cannot leave a process: {e}")
            raise
        channel.send({"call": call})
        reply = channel.receive()
        if "raised" in reply:
            raise rebuild_exception(*reply["raised"])
        return decode(reply["value"])

    try:
        module = load("check", job["prelude"], job["source"])
        # Some checks call the function by its own name.
        setattr(module, job["entry_point"], candidate)
        function = module.check
    except Exception as e:
        channel.send({"verdict": None, "reason": f"its check does not load: {type(e).__name__}: {e}"})
        return
    try:
        function(candidate)
        verdict = True
    except Exception:
        verdict = False
    if not calls:
        # Such a check would pass any answer.
        unsuited.append("its check never calls the candidate")
    channel.send({"verdict": None, "reason": unsuited[0]} if unsuited else {"verdict": verdict})

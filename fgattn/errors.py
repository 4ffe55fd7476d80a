"""Errors that users see: what is wrong, what was given, what is allowed, and what to do."""

import math
from numbers import Real

LONGEST = 300  # characters of a value that a message repeats


class InvalidArgument(ValueError):
    """A wrong setting, layout or tensor; the message has what, got, allowed and remedy."""

    def __init__(self, what: str, got: object, allowed: str, remedy: str):
        super().__init__(f"{what}: got {_shown(got)}; allowed: {allowed}. {remedy}")

    def __reduce__(self):
        """Copied and pickled by the message alone: what was given may be anything."""
        return _again, (type(self), *self.args)


class Unsupported(InvalidArgument):
    """The inputs are valid, but no implementation here can run them; callers may go dense."""


def _again(kind: type[InvalidArgument], text: str) -> InvalidArgument:
    """An error with the message of another."""
    return kind.__new__(kind, text)


def one_line(error: Exception) -> str:
    """An exception as a short text; its type alone where it has none that can be shown."""
    try:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    except Exception:
        return type(error).__name__


def check_type(what: str, value: object, kind: type, remedy: str) -> None:
    """Raise InvalidArgument unless the value is of this type; the message has its type, not its text."""
    if not isinstance(value, kind):
        raise InvalidArgument(what, type(value), f"an instance of {kind.__name__}", remedy)


def is_number(value: object) -> bool:
    """Whether this is a finite number that a float can hold; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _shown(value: object) -> str:
    """A value as text, cut where it is long; its type where it has no text, as numbers of 5 000 digits."""
    try:
        text = repr(value)
    except Exception:
        return f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."

"""Errors that users see: what is wrong, what was given, what is allowed, and what to do."""


class InvalidArgument(ValueError):
    """A wrong setting, layout or tensor; the message has what, got, allowed and remedy."""

    def __init__(self, what: str, got: object, allowed: str, remedy: str):
        super().__init__(f"{what}: got {got!r}; allowed: {allowed}. {remedy}")

    def __reduce__(self):
        """Copied and pickled by the message alone: what was given may be anything."""
        return _again, (type(self), *self.args)


class Unsupported(InvalidArgument):
    """The inputs are valid, but no implementation here can run them; callers may go dense."""


def _again(kind: type[InvalidArgument], text: str) -> InvalidArgument:
    """An error with the message of another."""
    return kind.__new__(kind, text)


def check_type(what: str, value: object, kind: type, remedy: str) -> None:
    """Raise InvalidArgument unless the value is of this type; the message has its type, not its text."""
    if not isinstance(value, kind):
        raise InvalidArgument(what, type(value), f"an instance of {kind.__name__}", remedy)

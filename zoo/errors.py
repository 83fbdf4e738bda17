"""The error for what a user of a command got wrong."""

__all__ = ["InputError", "reason"]


class InputError(ValueError):
    """Something that a user gave is wrong; the message is one line that says what. Commands exit with code 2."""


def reason(error: BaseException) -> str:
    """Returns the first line of an error's message, or its kind if it has none."""
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__

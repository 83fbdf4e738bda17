"""The error for what a user of a command got wrong."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Something that a user gave is wrong; the message is one line that says what. Commands exit with code 2."""

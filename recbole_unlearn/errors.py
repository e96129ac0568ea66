"""What is said where the user gave something that cannot be used."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what is wrong, and what to do.

    The command line prints it and exits with status 2; nothing has been written when it is raised.
    """


@contextmanager
def about(subject: str) -> Iterator[None]:
    """An `InputError` raised meanwhile says first what it is about, unless it does."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(subject.partition(":")[0]):
            raise
        raise InputError(f"{subject}: {error}") from None

"""The errors that a user can act on, by kind; the command line prints them without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 600  # characters of another library's message that are quoted


class NSCError(Exception):
    """The base of every error that the user can act on; its text says what is wrong, where, and what to do."""


class AdapterError(NSCError):
    """An adapter folder is missing, broken, untrained or contradicts itself."""


class UnsupportedAdapter(AdapterError):
    """An adapter uses features whose update is not ``scale * B @ A`` on a linear layer."""


class NameMismatch(NSCError):
    """A module of an adapter has no counterpart in the base, more than one, or one of another shape."""


class DataError(NSCError):
    """The rows of a task are missing, empty or unreadable."""


class TargetError(NSCError):
    """The target layers of the objective do not exist, or there are none."""


class ProofError(NSCError):
    """The weights that were reloaded from disk are not those that were merged."""


class ResumeError(NSCError):
    """A checkpoint does not belong to the merge that should be resumed."""


class NonFiniteError(NSCError):
    """NaN or infinity appeared in activations, in the loss or in a coefficient."""


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, for a table, a warning or another error.

    Args:
        error: any exception.

    Returns:
        The message, every run of white space a space; of a long one its two ends, and of an empty one the exception's
        class name.
    """
    text = " ".join(str(error).split())
    return clipped(text) if text else type(error).__name__


def clipped(text: str, longest: int = LONGEST) -> str:
    """Return a text that is no longer than so many characters.

    Args:
        text: any text.
        longest: how many.

    Returns:
        The text itself, or its two ends.
    """
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} [...] {text[-half:]}"


@contextmanager
def reading(what: str, remedy: str, kind: type[NSCError] = NSCError, fault: str = "cannot be read") -> Iterator[None]:
    """Turn whatever a library raises inside on a user's input into one sentence with cause and remedy.

    Args:
        what: what is read, as the subject of the sentence.
        remedy: what to do if it cannot be.
        kind: class of the error.
        fault: what is wrong with it.

    Yields:
        Nothing.

    Raises:
        NSCError: of ``kind``, for any exception inside that is no NSCError already.
    """
    try:
        yield
    except NSCError:
        raise
    except Exception as error:  # parsers raise many kinds, RecursionError and OverflowError among them
        raise kind(f"{what} {fault} ({one_line(error)}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for quoting an error of torch or the driver in one sentence.

    Args:
        error: any exception.

    Returns:
        The line, or the exception's class name where the message is empty.
    """
    return str(error).partition("\n")[0] or type(error).__name__

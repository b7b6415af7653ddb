"""The errors that a user can act on, by kind; the command line prints them without a traceback."""


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
    """Return an error's message in one line, for a table or a warning.

    Args:
        error: any exception.

    Returns:
        The message, every run of white space a space.
    """
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for quoting an error of torch or the driver in one sentence.

    Args:
        error: any exception.

    Returns:
        The line, or the exception's class name where the message is empty.
    """
    return str(error).partition("\n")[0] or type(error).__name__

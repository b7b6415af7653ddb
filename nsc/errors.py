"""Everything nsc refuses, by kind. The command line prints these without a traceback."""


class NSCError(Exception):
    """Base of every error that the user can act on; its text says what, where and what to do."""


class AdapterError(NSCError):
    """An adapter folder is missing, broken, untrained or contradicts itself."""


class UnsupportedAdapter(AdapterError):
    """An adapter uses features whose update is not ``scale * B @ A`` on a linear layer."""


class NameMismatch(NSCError):
    """An adapter's module has no counterpart in the base, more than one, or one of another shape."""


class DataError(NSCError):
    """Unlabeled rows are missing, empty or unreadable."""


class TargetError(NSCError):
    """The target layers of the objective are empty or do not exist."""


class ProofError(NSCError):
    """What was reloaded from disk is not what was merged."""


class ResumeError(NSCError):
    """A checkpoint does not belong to the merge that should be resumed."""


class NonFiniteError(NSCError):
    """NaN or infinity appeared in activations, in the loss or in a coefficient."""

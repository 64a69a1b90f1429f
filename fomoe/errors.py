"""The errors a user can meet.

    FomoeError
    ├── FormatError         a file is not what it claims to be: truncated, hostile, inconsistent
    ├── UnsupportedError    well-formed, but an architecture, type or feature that fomoe lacks
    ├── BudgetError         the memory budget cannot hold what must be held
    ├── RequestError        a request that cannot be served as asked: prompt too long, bad option
    ├── ReadError           the drive failed: names file, offset and, for experts, layer and expert
    └── ClosedError         the engine was closed

Every message says what is wrong and what would help. Errors of our own making (a broken invariant)
are AssertionErrors and are never shown as one of these.
"""


class FomoeError(Exception):
    """Base of everything that fomoe raises for a cause outside its own code."""


class FormatError(FomoeError):
    """A file is truncated, inconsistent or not of the format it claims."""


class UnsupportedError(FomoeError):
    """The file is well-formed, but needs something that fomoe does not have."""


class BudgetError(FomoeError):
    """The memory budget cannot hold what must be held; the message names a budget that would do."""


class RequestError(FomoeError):
    """A request that cannot be served as asked."""


class ReadError(FomoeError):
    """A read from a drive failed for good, after its retries."""


class ClosedError(FomoeError):
    """The engine or reader was closed."""

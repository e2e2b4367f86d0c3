"""The faults that vitq reports without a traceback, one class an exit code.

Every message is one line or a few and says what was given, what is accepted and what to do next. The command line prints it on
stderr and ends with `exit_code`; a Python caller catches `VitqError` or the child that it can do something about.
"""


class VitqError(Exception):
    """What all faults share: a message for people and the exit code of the command line."""

    exit_code = 1


class UsageError(VitqError):
    """An option or argument that cannot be used: a wrong value, an output that exists already."""

    exit_code = 2


class InputError(VitqError):
    """An input that is missing, damaged, stale or of another kind."""

    exit_code = 3


class BudgetError(VitqError):
    """A budget that no plan meets; the message gives what is reachable."""

    exit_code = 4


class VerificationError(VitqError):
    """An exported file that does not compute what was calibrated; the file is not left behind."""

    exit_code = 5


class GateError(VitqError):
    """An accuracy or latency limit that the user set and the artifact misses."""

    exit_code = 6

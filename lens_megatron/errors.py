"""The two ways a command ends badly. Both print one line and no traceback."""


class UsageError(Exception):
    """Bad input or usage: what is wrong, where, and what would be right. Exit code 2."""


class RunError(Exception):
    """The run itself failed: a check that did not hold, a worker that died. Exit code 1."""

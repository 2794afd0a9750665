"""The ways a command ends badly. They print one line and no traceback."""


class UsageError(Exception):
    """Bad input or usage: what is wrong, where, and what would be right. Exit code 2."""


class RunError(Exception):
    """The run itself failed: a check that did not hold, a worker that died. Exit code 1."""


class Terminated(SystemExit):
    """Told to end, by SIGTERM. No Exception: whoever handles an error of what is being done, a damaged file, a server that
    does not answer, must not take it for one, and go on. Exit code 1."""

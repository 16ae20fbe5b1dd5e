"""The one exception type whose message is meant for the person at the keyboard."""


class DsparseError(ValueError):
    """Bad input. The message is one line naming the file, field or tensor and what to do about it.

    Command-line entry points print it without a traceback and exit with status 1.
    """

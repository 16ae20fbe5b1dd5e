"""The one exception type whose message is meant for the person at the keyboard."""


class DsparseError(ValueError):
    """Bad input. The message is one line naming the file, field or tensor and what to do about it.

    Command-line entry points print it without a traceback and exit with status 1.
    """


def one_line(error: DsparseError | OSError) -> str:
    """What a command prints instead of a traceback."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)

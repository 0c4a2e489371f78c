"""What is raised for files that are not read."""

LINES, WIDTH = 1000, 500  # of a message: what is in it comes from files


class FormatError(ValueError):
    """Files of a model or an adapter that are damaged, of another format, too large, or do not fit.

    Whatever the files hold, its message can be printed: control characters are escaped, and long lines cut.
    """

    def __init__(self, message: str) -> None:
        lines = [_printable(line) for line in message.split("\n")]
        more = [f"... and {len(lines) - LINES} more"] if len(lines) > LINES else []
        super().__init__("\n".join(lines[:LINES] + more))


class AdapterFormatError(FormatError):
    """An adapter that `load_adapter` refuses: its message names everything that is wrong with it."""


def _printable(line: str) -> str:
    line = line if len(line) <= WIDTH else f"{line[: WIDTH // 2]}...{line[-WIDTH // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)

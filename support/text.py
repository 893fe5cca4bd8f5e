"""Words of strangers (servers, environments, logs) as they may be printed."""
import re
import sys
import traceback

ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.")


def plain(text: str) -> str:
    """The text in one line, without escape sequences and without characters that do not print.

    >>> plain("\\x1b[31mred\\x1b[0m\\r\\nand \\x1b]0;title\\x07blue")
    'red and blue'
    """
    text = ESCAPES.sub("", text)
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())


def describe(error: BaseException) -> str:
    """The type of an exception and what it says, in one line that is never without a word."""
    try:
        said = str(error)
    except Exception:  # one of a user's own may fail in this, too
        said = "what it says cannot be read"
    return plain(f"{type(error).__name__}: {said.strip() or 'without a word'}")


def print_plainly(kind: type, error: BaseException, trace) -> None:
    """A traceback as Python prints it, but for what does not print; to be sys.excepthook."""
    for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
        indent = len(line) - len(line.lstrip(" "))
        print(" " * indent + plain(line), file=sys.stderr)

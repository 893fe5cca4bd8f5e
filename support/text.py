"""Words of strangers (servers, environments, logs) as they may be printed."""
import re

ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.")


def plain(text: str) -> str:
    """The text in one line, without escape sequences and without characters that do not print.

    >>> plain("\\x1b[31mred\\x1b[0m\\r\\nand \\x1b]0;title\\x07blue")
    'red and blue'
    """
    text = ESCAPES.sub("", text)
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())


def make_plain(error: BaseException) -> None:
    """Let an exception say its own words plainly, in a traceback, too."""
    error.args = tuple(plain(arg) if isinstance(arg, str) else arg for arg in error.args)

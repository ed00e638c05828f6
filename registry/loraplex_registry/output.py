r"""Where the command's words go: streams that may be closed, full or narrow in their characters, and names from afar.

Names, reasons and addresses in a bucket are written by others. What a terminal would obey instead of show (ESC and the
like, characters that turn the direction of writing round) is written as an escape, `\x1b`; so is what a stream's
encoding cannot hold. A stream that was closed is as good as `/dev/null`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO, cast


class OutputFault(Exception):  # noqa: N818  (it is printed and never leaves the command)
    """An answer cannot be written, for example on the full disk behind `registry ls > file`."""


class _Plain(io.TextIOBase):
    """Passes text on with everything escaped that is no printable character, line end or tab."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(shown(text))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputFault(error.strerror) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputFault(error.strerror) from error


def plain(stream: TextIO) -> TextIO:
    """Return a stream that shows what it is given and obeys none of it.

    Raises:
        OutputFault: from `write` and `flush`, when the stream cannot be written; BrokenPipeError is passed on.
    """
    return cast(TextIO, _Plain(stream))


def shown(text: str) -> str:
    """Return a text in which only printable characters, line ends and tabs are left as they are."""
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def prepare() -> None:
    """Make standard output and error usable: closed ones lead nowhere, and no character is too much for them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop() -> None:
    """Let what is still buffered for standard output go nowhere, so that the interpreter does not fail at it again."""
    with contextlib.suppress(OSError):  # not a file: a test's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

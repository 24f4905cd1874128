"""What terminals and pipes do to a command, without ending it.

    | head, a closed window    what nobody reads any more is dropped, and the work goes on
    ASCII, latin-1             letters that the output does not know are shown as \\u2581
    Ctrl-C                     one line; a run that trains has its own way, which saves (run.py, StopRequest)
"""
import errno
import io
import os
import re
import sys


class Output(io.FileIO):
    """Standard output, or standard error, that outlives whoever reads it."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # the pipe is closed; the terminal is gone
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return len(data)


def prepare() -> None:
    """Every command's first act. Streams that somebody has put in the place of Python's own stay as they are."""
    sys.excepthook = last_words
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, "w"))
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            raw = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace",
                                                line_buffering=stream.line_buffering,
                                                write_through=stream.write_through))


def visible(text: str) -> str:
    """What a model has said, without the characters by which it could move a terminal's cursor, and more."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def last_words(kind: type, error: BaseException, trace) -> None:
    """A traceback, but for Ctrl-C."""
    if kind is KeyboardInterrupt:
        print("\nstopped by Ctrl-C; files written before are whole", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)

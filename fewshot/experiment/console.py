"""Nothing that only prints may end a program."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time


class Unbroken(io.FileIO):
    """The raw file below stdout or stderr; what cannot be printed is dropped."""

    def write(self, data) -> int:
        try:
            while (written := super().write(data)) is None:  # a terminal that another program made non-blocking
                time.sleep(0.01)
            return written
        except OSError:  # closed, a pipe that nobody reads, a lost terminal, a full disk
            return len(data)


def keep_printing() -> None:
    """From now on no print, progress bar or warning ends the program, whatever becomes of stdout and stderr."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with it closed; /dev/null takes its number, so that no file of the run does
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
            continue
        if hasattr(stream, "reconfigure"):  # a console that lacks a character shows its number
            stream.reconfigure(errors="backslashreplace")
        below = getattr(stream, "buffer", None)
        raw = getattr(below, "raw", below)
        if stream is not getattr(sys, f"__{name}__") or type(raw) is not io.FileIO:
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        unbroken = Unbroken(raw.fileno(), "w", closefd=False)
        how = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": stream.line_buffering}
        buffer = unbroken if raw is below else io.BufferedWriter(unbroken)  # python -u has no buffer
        setattr(sys, name, io.TextIOWrapper(buffer, **how, write_through=stream.write_through))

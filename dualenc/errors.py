"""Errors in one line instead of a traceback, and files that are written whole or not at all."""

import argparse
import contextlib
import gc
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

MAX_LISTED_FAULTS = 20


class InputError(ValueError):
    """Bad input; the lines name the file, row or option, and say what to do."""

    def __init__(self, *lines: str):
        super().__init__("\n  ".join(printable(line) for line in lines))

    @classmethod
    def of(cls, headline: str, faults: Sequence[str]) -> "InputError":
        """Make one error of several faults: the first twenty, then how many more there are."""
        if len(faults) == 1:
            return cls(f"{headline}: {faults[0]}")
        lines = [f"{headline} ({len(faults):,}):", *faults[:MAX_LISTED_FAULTS]]
        if len(faults) > MAX_LISTED_FAULTS:
            lines.append(f"and {len(faults) - MAX_LISTED_FAULTS:,} more")
        return cls(*lines)


def printable(text: str) -> str:
    """Write line breaks, terminal controls and bytes that are not UTF-8 as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def counted(count: int, singular: str, plural: str | None = None) -> str:
    """Write a count with its noun: "1 clip", "1,045 clips"; by default the plural has an s."""
    if count == 1:
        return f"1 {singular}"
    return f"{count:,} {plural or singular + 's'}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's name if it has no message."""
    return (str(error).strip() or repr(error)).splitlines()[0]


# --- Options ---


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors: one line, without the list of options."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists all options)")


def positive_int(text: str) -> int:
    """Read a whole number above zero, as a type for argparse."""
    number = _read_number(int, text)
    if number is None or number <= 0:
        raise argparse.ArgumentTypeError(f"{text}: a whole number above 0 is needed")
    return number


def not_negative_int(text: str) -> int:
    """Read a whole number of at least zero, as a type for argparse."""
    number = _read_number(int, text)
    if number is None or number < 0:
        raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 0 is needed")
    return number


def positive_float(text: str) -> float:
    """Read a finite number above zero, as a type for argparse."""
    number = _read_number(float, text)
    if number is None or not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is needed")
    return number


def not_negative_float(text: str) -> float:
    """Read a finite number of at least zero, as a type for argparse."""
    number = _read_number(float, text)
    if number is None or not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number of at least 0 is needed")
    return number


def _read_number(number_type: type, text: str) -> int | float | None:
    """Read a number; None where the text is none."""
    try:
        return number_type(text)
    except ValueError:
        return None


# --- Commands ---


def run_command(main: Callable[[], int | None], rank: int = 0) -> None:
    """Run a command and exit with its status: 2 on bad input, 130 after Ctrl-C.

    Args:
        main: does the command's work; returns its exit status, None for 0.
        rank: this process's number among several; only the first of them prints an error.
    """
    name = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):  # A file's name need not be valid UTF-8.
        stream.reconfigure(errors="backslashreplace")
    # At exit, Python would look for garbage in all that the libraries hold: 2.5 s instead of 0.4.
    gc.freeze()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough: Python's last flush must not fail on it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        reason = reason_of(error)
        if reason is None:
            raise
        if rank == 0:
            print(f"{name}: {reason}", file=sys.stderr)
        sys.exit(2)


def reason_of(error: Exception) -> str | None:
    """Say in one line what a user can do about an error; None where it is a fault of the program.

    torch's errors are known by their names and words, so that it need not be imported here.
    """
    if isinstance(error, InputError | OSError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory (training: --micro-batch 8): {error}"
    if "DataLoader worker (pid" in str(error) or "shared memory(shm)" in str(error):
        return (
            "a process that prepares batches died, probably for want of shared memory: give "
            "--workers 0, or the machine (the container) a larger /dev/shm"
        )
    return None


# --- Files ---


def check_output_file(path: Path) -> None:
    """Raise an InputError if a file cannot be written there, before long work is done for it."""
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{path}: cannot be written; name a file in a folder that is there")


@contextlib.contextmanager
def replacing(path: str | os.PathLike, by_many: bool = False) -> Iterator[Path]:
    """Yield a temporary path; once it is written whole, its file takes the place of `path`.

    If the process is killed meanwhile, one temporary file stays, which the next write replaces.

    Args:
        path: the file; its folder is made where there is none.
        by_many: several processes may write the file at once, so each has a temporary file of its
            own; that of a killed process stays for good.

    Raises:
        InputError: the file cannot be written (no space, no permission); the old one is intact.
    """
    path = Path(path)
    writer = f".{os.getpid()}" if by_many else ""
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written ({reason}); what was there is kept") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()

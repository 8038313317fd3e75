"""When things go wrong: one line instead of a traceback, and files that are whole or not there."""

import argparse
import contextlib
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

MAX_LISTED_FAULTS = 20


class InputError(ValueError):
    """Bad input: names the file, row or option and says what to do, in a line for each argument."""

    def __init__(self, *lines: str):
        super().__init__("\n  ".join(map(printable, lines)))

    @classmethod
    def of(cls, headline: str, faults: Sequence[str]) -> "InputError":
        """One error for faults of one kind: the first twenty, then how many more."""
        if len(faults) == 1:
            return cls(f"{headline}: {faults[0]}")
        lines = [f"{headline} ({len(faults):,}):", *faults[:MAX_LISTED_FAULTS]]
        if len(faults) > MAX_LISTED_FAULTS:
            lines.append(f"and {len(faults) - MAX_LISTED_FAULTS:,} more")
        return cls(*lines)


def printable(text: str) -> str:
    """The text with line breaks, terminal controls and bytes that are not UTF-8 as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def positive_int(text: str) -> int:
    """Read a whole number above zero, as a type for argparse."""
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text}: a whole number above 0 is needed")
    return number


def not_negative_int(text: str) -> int:
    """Read a whole number of at least zero, as a type for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 0 is needed")
    return number


def positive_float(text: str) -> float:
    """Read a finite number above zero, as a type for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is needed")
    return number


def not_negative_float(text: str) -> float:
    """Read a finite number of at least zero, as a type for argparse."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number of at least 0 is needed")
    return number


class Parser(argparse.ArgumentParser):
    """An argument parser for whose errors one line is enough."""

    def __init__(self, description: str):
        text = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=text, allow_abbrev=False)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists all options)")


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command and exit: with 2 after one line on bad input, with 130 after Ctrl-C."""
    name, is_first = Path(sys.argv[0]).name, os.environ.get("RANK", "0") == "0"
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be valid UTF-8
        stream.reconfigure(errors="backslashreplace")
    gc.freeze()  # at the end Python would look through all that the libraries hold, for two seconds
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (InputError, OSError) as error:
        if is_first:  # of many processes the first one speaks for all
            print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            print(f"{name}: out of memory (training: --micro-batch 8): {error}", file=sys.stderr)
            sys.exit(2)
        if not is_first:  # it may only have lost its connection to one that failed and says why
            time.sleep(3)  # in which torchrun ends it
        raise


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path; when all is written to it, it takes path's place.

    Where it cannot be written (no space, no permission) is an InputError; the old file is intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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

"""Text-to-audio retrieval with a dual encoder: PaSST for sounds, RoBERTa for sentences.

Here stands what every module shares: one error, one way out of a command, one way to write a file.
"""

import contextlib
import fcntl
import functools
import glob
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

MAX_LISTED_FAULTS = 20
GRACE_SECONDS = 3  # torchrun needs a tenth of one to see that a process has failed
PASSED_ON_SECONDS = 1  # torchrun passes a signal on to processes that may have had it already


class InputError(ValueError):
    """Bad input: its text names the file, row or option and says what to do.

    Each argument is one line of it, whatever the file names in it hold.
    """

    def __init__(self, *lines: str):
        super().__init__("\n  ".join(map(printable, lines)))

    @classmethod
    def of(cls, headline: str, faults: Sequence[str], more: str = "") -> "InputError":
        """One error for several faults of one kind: the first twenty, and how many more.

        Args:
            more: follows that number, such as where to find the others.
        """
        if len(faults) == 1:
            return cls(f"{headline}: {faults[0]}")
        lines = [f"{headline} ({len(faults)}):", *faults[:MAX_LISTED_FAULTS]]
        if len(faults) > MAX_LISTED_FAULTS:
            lines.append(f"and {len(faults) - MAX_LISTED_FAULTS} more{more}")
        return cls(*lines)


def printable(text: str) -> str:
    """Line breaks, terminal controls and bytes that are not UTF-8 are written as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def run(main: Callable[[], int | None]) -> None:
    """Run a command: bad input, Ctrl-C and SIGTERM end it with a line instead of a traceback."""
    name = Path(sys.argv[0]).name
    # A file name that is not valid UTF-8 must not stop the message that names it.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    if not _is_one_of_many():  # torchrun itself says whom it ends
        signal.signal(signal.SIGTERM, functools.partial(_end_of_sigterm, name))
        # Forked workers end as ever: one that waits for a lock may never come to run a function.
        default = functools.partial(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        os.register_at_fork(after_in_child=default)
    try:
        with _one_voice():
            status = main()
            sys.stdout.flush()  # what it holds back may fail, too
        sys.exit(status)
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if _is_first():
            print("\nInterrupted. The same command goes on from what was saved.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _drop_output()
        sys.exit(0)
    except OSError as error:  # permissions, file systems: what it says is all there is to know
        if error.filename is None:  # of a stream, such as the output's
            _drop_output()
        place = f"{error.filename}: " if error.filename else ""
        print(f"{name}: {InputError(f'{place}{error.strerror or error}')}", file=sys.stderr)
        sys.exit(2)


def _end_of_sigterm(name: str, number: int, frame) -> None:
    """End at once: an exception would be lost where it met the fork of a worker, for example."""
    line = f"\n{name}: ended by SIGTERM. The same command goes on from what was saved.\n"
    os.write(sys.stderr.fileno(), line.encode())
    os._exit(128 + number)


def _drop_output() -> None:
    """What standard output still holds back would fail again when the program ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Of many processes (torchrun) that fail together, let one say why.

    What is wrong with the input all of them see; the first one says it. Where any process fails,
    the others lose their connection to it. They hold their tongue until torchrun has ended them; if
    it does not, theirs is an error of their own, and they speak.
    """
    try:
        yield
    except Exception as error:  # whatever it is, it goes on
        if _is_one_of_many() and not (_is_first() and isinstance(error, InputError)):
            time.sleep(GRACE_SECONDS)
        raise


def _is_one_of_many() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _is_first() -> bool:
    """Whether this is the first of torchrun's processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class stop_signals(contextlib.AbstractContextManager):  # noqa: N801 - reads as a verb, as open does
    """While open, Ctrl-C and SIGTERM are noted in `requested`; a second one gets through."""

    requested: signal.Signals | None = None

    def __enter__(self) -> "stop_signals":
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self.first_at = signal.Signals(number), now
        elif now - self.first_at > PASSED_ON_SECONDS:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.requested and isinstance(error, RuntimeError):
            # Nothing is left to finish: torchrun ends this process because another has died.
            signal.raise_signal(self.requested)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and takes path's place.

    A reader, or whoever comes after a crash, finds the old file or the new one, never a part.

    Raises:
        InputError: the file cannot be written (no space, no permission); the old one is intact.
    """
    path = Path(path)
    unique = f"{os.urandom(4).hex()}.{os.getpid()}"  # two containers may have the same process ids
    temporary = path.with_name(f".{path.name}.{unique}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent, glob.escape(path.name))
        with _locked(temporary) as file:
            yield temporary
            os.fsync(file.fileno())
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written ({reason}); what was there is kept") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_unfinished(folder: Path, names: str) -> None:
    """Remove what processes left that were killed while they wrote files of these names.

    Args:
        names: a pattern, as of glob.
    """
    for unfinished in folder.glob(f".{names}.*.tmp"):
        # Another's, or locked: it is being written, here, in another container or elsewhere.
        with contextlib.suppress(OSError), open(unfinished, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unfinished.unlink()


def _locked(path: Path) -> BinaryIO:
    """A new file, open and locked for as long as it is."""
    while True:
        file = open(path, "wb")
        with contextlib.suppress(OSError):  # a file system without locks: nobody removes it, either
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():  # else it was taken for a left one before it was locked
            return file
        file.close()


def _sync_folder(folder: Path) -> None:
    """Else a power cut may undo that a file has taken another's place."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems sync no folders
        os.fsync(descriptor)
    os.close(descriptor)

"""The processes that prepare batches while this one trains."""

import atexit
import contextlib
import multiprocessing
import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dualenc import InputError
from dualenc.data import Batch, PairBatches


def load(batches: PairBatches, steps: range, workers: int, device: torch.device) -> DataLoader:
    """The batches of these steps in turn, made by so many workers; 0 makes them here."""
    if workers:
        atexit.register(_kill_workers)
    return DataLoader(
        batches, batch_size=None, sampler=steps, num_workers=workers,
        pin_memory=device.type == "cuda", worker_init_fn=_leave_signals_to_parent,
        collate_fn=_share if workers else None,
        # Python 3.14 would start workers afresh and copy the memory-mapped cache to each.
        multiprocessing_context="fork" if workers else None,
    )


def _leave_signals_to_parent(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    """At exit: multiprocessing would send SIGTERM to those that still work, and wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for worker in multiprocessing.active_children():
        worker.kill()


def _share(batch: Batch) -> Batch:
    """Move a batch to shared memory here: the thread that sends it would hang without room."""
    for value in vars(batch).values():
        if isinstance(value, Tensor):
            value.share_memory_()
    return batch


@contextlib.contextmanager
def lost_workers_are_named() -> Iterator[None]:
    """Where a worker fails, an error may be raised anywhere in the loop that uses its batches.

    Raises:
        InputError: instead of it.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
        raise InputError(
            f"a process that prepares batches has failed ({reason}): give fewer --workers (0 works "
            "without them), or more memory or /dev/shm (docker run --shm-size 8g)"
        ) from error

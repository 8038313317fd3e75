"""What is around the loop in train.py: learning rate, processes, signals, and a run's files.

    runs/NAME/log.jsonl   JSON lines: first all settings and versions; then one for every interval
                          of steps, and one for every epoch
    runs/NAME/last.pt     the state of the run: the model, and all that resuming needs
    runs/NAME/best.pt     the model of the best epoch by validation mAP@10
    runs/NAME/curves.svg  losses, learning rate and validation mAP@10
    runs/NAME/teacher-*   in stage 2, a teacher's embeddings of the training set
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualenc.checkpoints import save_atomically
from dualenc.errors import InputError


def learning_rate(
    step: int, steps_per_epoch: int, warmup_epochs: float, decay_epochs: float, max_lr: float,
    min_lr: float,
) -> float:
    """Return a step's learning rate: it rises from min_lr to max_lr, then falls back, and stays.

    The rise (warm-up) is linear, the fall (decay) half a cosine. Steps count from 0 over the whole
    run; the decay begins where the warm-up ends.
    """
    warmup = warmup_epochs * steps_per_epoch
    decay = decay_epochs * steps_per_epoch
    if step < warmup:
        return min_lr + (max_lr - min_lr) * step / warmup
    if step < warmup + decay:
        return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * (step - warmup) / decay)) / 2
    return min_lr


def seed_of(*numbers: int) -> int:
    """Make one seed of several numbers, such as a run's seed, a step and a process's rank."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# --- Processes: a single one, or several that torchrun started ---

# The number of processes, and this one's rank, counted from 0. torchrun sets both variables; a
# RANK without a WORLD_SIZE was set by something else.
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0
# How long the others wait while the first one decodes, embeds with the teachers or validates.
PATIENCE = datetime.timedelta(hours=12)


def join_processes(device: torch.device) -> None:
    """Join the processes that torchrun has started, if there are any; this one uses `device`."""
    if WORLD > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Run the block in the first process, then in the others, which find the files it wrote.

    Such files are downloads, decoded sounds, the teachers' embeddings and the run's log.
    """
    # The others wait here until the first process, after its block, reaches its own barrier.
    if RANK > 0:
        dist.barrier()
    yield
    if RANK == 0 and WORLD > 1:
        dist.barrier()


def sum_gradients(model: nn.Module) -> None:
    """Sum the gradients over all processes.

    Each process has back-propagated the loss of the whole batch into its own rows only.
    """
    if WORLD > 1:
        sums = [dist.all_reduce(p.grad, async_op=True) for p in model.parameters()]
        for pending_sum in sums:
            pending_sum.wait()


def print_fact(label: str, fact: object) -> None:
    """Print one fact about the run, in the first process only."""
    if RANK == 0:
        print(f"{label:11} {fact}", flush=True)


# --- Stopping ---


class StopRequest:
    """The first Ctrl-C or SIGTERM: the loop saves and ends. A second one ends the run at once.

    With several processes signals are not caught: each process would stop at a different step.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        if WORLD == 1:
            signal.signal(signal.SIGINT, self._note)
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame) -> None:
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        message = (
            f"\n{self.signal.name}: the step, and at an epoch's end the validation, is finished "
            "and saved first; another Ctrl-C or SIGTERM ends the run now.\n"
        )
        # The signal may have interrupted a print(), which cannot be entered twice.
        os.write(2, message.encode())

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """Return the status by which a shell knows the signal: 130 or 143; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal


# --- What a run leaves, and how the same command resumes it ---

# Settings that may change when a run is resumed. The paths of data and of teachers are among them,
# since digests are compared instead: of names and captions, and of the teachers' files.
MAY_CHANGE = {
    "out", "datasets", "validation", "data_dir", "cache_dir", "device", "workers", "epochs",
    "max_steps", "save_every", "log_every", "micro_batch", "teachers",
}
PACKAGES = ("dualenc", "torch", "torchaudio", "hear21passt", "transformers", "numpy", "av")
NOT_FINITE = (
    "stopped, and last.pt is as it was; with another --out, try a lower --max-lr or "
    "--precision fp32"
)


class Run:
    """A run: its folder, and how far it has come."""

    def __init__(self, folder: Path, settings: dict):
        """Open the folder, or make it; the first process locks it.

        Args:
            settings: {name: plain value}. A run that was saved is resumed with the same ones only,
                but for those of MAY_CHANGE.

        Raises:
            InputError: the folder holds a run with other settings, or other files and no run, or
                another process trains in it, or it cannot be written.
        """
        self.folder = folder
        self.log_path = folder / "log.jsonl"
        self.last_path = folder / "last.pt"
        self.best_path = folder / "best.pt"
        self.step = 0  # steps finished
        self.best = -1.0  # the highest validation mAP@10 so far
        self.losses: list[dict[str, float]] = []  # the losses of each step of this epoch
        self.unread_losses: list[dict[str, Tensor]] = []  # of the newest steps, still on the device
        self.clock_start = (0, 0.0)  # (step, seconds) from which steps are timed

        settings = json.loads(json.dumps(settings, default=str))
        self.log_file = self._open_log()
        if RANK == 0:
            self._lock()
        changes = self._changes(settings)
        if self.last_path.exists():
            if changes:
                headline = "holds a run with other settings; give its settings, or another --out"
                raise InputError.of(f"{folder} {headline}", changes)
        elif self.best_path.exists() and (changes or self._validations_in_log() > 1):
            # Then last.pt was removed, and best.pt must not be overwritten. In a run that was
            # killed in its first validation, between writing best.pt and last.pt, the settings are
            # the same and the log tells of one validation at most: it begins again, below.
            raise InputError(
                f"{folder}: holds a trained best.pt, but no last.pt to resume from; give another "
                "--out"
            )
        elif RANK == 0:
            # There is nothing to resume, so the run begins again, and all settings may differ.
            if changes:
                self._remove_teachers_embeddings()
            self.log_file.truncate(0)
            self._write_line({"settings": settings, "versions": versions()})

    def _open_log(self):
        if not self.log_path.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(f"--out {self.folder}: holds other files than a run's; name another")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return open(self.log_path, "a+")
        except OSError as error:
            raise InputError(f"--out {self.folder}: cannot be written ({error})") from error

    def _lock(self) -> None:
        """Lock the log; the system releases the lock of a process that dies."""
        try:
            fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{self.folder}: another process trains here; wait for it, or give another --out"
            ) from error
        except OSError:
            pass  # The file system knows no locks.

    def _changes(self, settings: dict) -> list[str]:
        """List the settings that differ from the log's and may not."""
        self.log_file.seek(0)
        try:
            logged = json.loads(self.log_file.readline())["settings"]
        except (ValueError, KeyError):
            logged = {}  # The log is new, or its first line was not written whole.
        changes = []
        for key in logged | settings:
            if key not in MAY_CHANGE and logged.get(key) != settings.get(key):
                # Digests tell whether the teachers are the same; a user knows them by their paths.
                shown = "teachers" if key == "teacher_digests" else key
                was = logged.get(shown)
                now = settings.get(shown)
                if was == now:  # As of teachers: the digests differ, not the paths.
                    now = "files of the same names with other contents"
                changes.append(f"{shown}: was {was}, now {now}")
        return changes

    def _validations_in_log(self) -> int:
        """Count the validations that the log tells of."""
        self.log_file.seek(0)
        _settings, *lines = self.log_file.readlines()
        return sum('"validation":' in line for line in lines)

    def _remove_teachers_embeddings(self) -> None:
        """Remove what an earlier start with other settings left: they may be of other data."""
        for path in self.folder.glob("teacher-*.pt"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the log. Its lock is released when no process has the log open.

        A forked data worker therefore closes its copy, or the folder would stay locked while the
        worker outlives the process that trains.
        """
        self.log_file.close()

    # --- Resuming and saving ---

    def resume(self, model: nn.Module, optimizer, scaler) -> None:
        """Go back to where last.pt was saved, if there is one.

        The log is cut back to its length at that time.
        """
        if not self.last_path.exists():
            return
        try:
            saved = torch.load(self.last_path, "cpu", weights_only=True, mmap=True)
            state = saved["training"]
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            self.step = state["step"]
            self.best = state["best"]
            self.losses = state["losses"]
            log_bytes = state["log_bytes"]
        except Exception as error:  # torch.load raises whatever its parsers meet.
            raise InputError(
                f"{self.last_path}: is damaged, or an earlier version's; name another --out"
            ) from error
        if RANK == 0:
            self.log_file.truncate(log_bytes)

    def save(self, model: nn.Module, optimizer, scaler) -> None:
        """Write last.pt; an InputError if a loss or a weight is not finite."""
        self.check_finite(model)
        if RANK > 0:
            return
        training = {
            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": self.step,
            "best": self.best, "losses": self.losses,
            "log_bytes": self.log_path.stat().st_size,
        }
        save_atomically(model.checkpoint() | {"training": training}, self.last_path)

    def check_finite(self, model: nn.Module) -> None:
        """Raise an InputError if a loss is not finite, or else if a weight is not."""
        self._read_losses()
        are_finite = [weights.isfinite().all() for weights in model.parameters()]
        if not torch.stack(are_finite).all():
            raise InputError(f"step {self.step}: the weights are not finite; {NOT_FINITE}")

    # --- Losses and the log ---

    def finish_step(self, losses: dict[str, Tensor]) -> None:
        """Count the step, and keep its losses, unread: to read them now would force a GPU sync."""
        self.unread_losses.append({name: value.detach() for name, value in losses.items()})
        self.step += 1

    def _read_losses(self) -> None:
        first = self.step - len(self.unread_losses) + 1
        for step, losses in enumerate(self.unread_losses, start=first):
            values = {name: value.item() for name, value in losses.items()}
            if not math.isfinite(values["loss"]):
                raise InputError(f"step {step}: the loss is {values['loss']}; {NOT_FINITE}")
            self.losses.append(values)
        self.unread_losses = []

    def mean_losses(self, last_steps: int | None = None) -> dict[str, float]:
        """Average each loss over the epoch's steps so far, or over the last few of them.

        Raises:
            InputError: a loss is not finite.
        """
        self._read_losses()
        steps = self.losses if last_steps is None else self.losses[-last_steps:]
        means = {}
        for name in steps[0]:
            means[name] = sum(losses[name] for losses in steps) / len(steps)
        return means

    def clear_losses(self) -> None:
        """Forget the losses of an epoch that has ended."""
        self.losses = []

    def start_clock(self) -> None:
        """Time the steps from here on, without what came before them, such as a validation."""
        self.clock_start = (self.step, time.perf_counter())

    def steps_per_second(self) -> float:
        """Return the speed since the clock was started."""
        step, seconds = self.clock_start
        return (self.step - step) / (time.perf_counter() - seconds)

    def log(self, **values) -> None:
        """Append a line to the log: the step, the time, and the values by name."""
        if RANK == 0:
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            self._write_line({"step": self.step, "time": now, **values})

    def _write_line(self, values: dict) -> None:
        self.log_file.write(json.dumps(values) + "\n")
        self.log_file.flush()


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the libraries that numbers depend on."""
    version_of = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            version_of[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # This is so of dualenc where it is run from its folder.
            version_of[package] = "not installed"
    return version_of

"""Around the loop in train.py: learning rate, processes, signals, and what a run leaves on disk.

    runs/NAME/log.jsonl   first line: every setting; then a JSON object per step interval and epoch
    runs/NAME/last.pt     the state of the run: loadable as a model, and all that resuming needs
    runs/NAME/best.pt     the model of the best epoch by validation mAP@10
    runs/NAME/curves.svg  losses, learning rate and validation mAP@10
"""

import contextlib
import datetime
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualenc.checkpoints import save_atomically
from dualenc.errors import InputError, replacing

STOPPED = "stopped, and last.pt is as it was (a lower --max-lr or --precision fp32 may help)"


def learning_rate(
    step: int, steps_per_epoch: int, warmup_epochs: float, decay_epochs: float, max_lr: float,
    min_lr: float,
) -> float:
    """Linear from min_lr to max_lr over the warm-up, a half cosine back to min_lr, then constant.

    The step counts from 0 over the whole run; the decay begins where the warm-up ends.
    """
    warmup, decay = warmup_epochs * steps_per_epoch, decay_epochs * steps_per_epoch
    if step < warmup:
        return min_lr + (max_lr - min_lr) * step / warmup
    if step < warmup + decay:
        return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * (step - warmup) / decay)) / 2
    return min_lr


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, such as those of run, step and process."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# --- Processes: one alone, or many that torchrun started ---

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
# How long the others wait for the first one, which decodes, embeds with the teachers and validates.
PATIENCE = datetime.timedelta(hours=12)


def join_processes(device: torch.device) -> None:
    """Join the processes that torchrun has started, if there are any; this one uses that device."""
    if WORLD > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process enters alone, and the others find made what it has made."""
    if RANK > 0:
        dist.barrier()
    yield
    if RANK == 0 and WORLD > 1:
        dist.barrier()


def sum_gradients(model: nn.Module) -> None:
    """Over processes: each has computed the whole batch's loss, and its own rows' gradient."""
    if WORLD > 1:
        for work in [dist.all_reduce(p.grad, async_op=True) for p in model.parameters()]:
            work.wait()


def stop_signals() -> list[int]:
    """A list to which the first Ctrl-C or SIGTERM is added; a second of its kind ends the process.

    Of many processes each would stop at another step: there, the first one does.
    """
    received: list[int] = []

    def note(number: int, frame) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM) if WORLD == 1 else ():
        signal.signal(number, note)
    return received


# --- What a run leaves, and how the same command goes on from it ---

FREE = {  # settings of how long, where and how a run is made, and those that digests tell better
    "out", "datasets", "validation", "data_dir", "cache_dir", "device", "workers", "epochs",
    "max_steps", "save_every", "log_every", "micro_batch", "teachers",
}


class Run:
    """A run's folder, and where the run is; an InputError where it holds another one."""

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.log_path = folder, folder / "log.jsonl"
        self.last_path, self.best_path = folder / "last.pt", folder / "best.pt"
        self.step, self.validated = 0, 0  # steps made, and those made when it was last validated
        self.best = -1.0  # the highest validation mAP@10 so far
        self.losses: list[dict[str, float]] = []  # of the epoch's steps
        self.pending: list[dict[str, Tensor]] = []  # on the device until they are wanted
        new = json.loads(json.dumps(settings, default=str))
        if not self.log_path.exists():
            if folder.exists() and any(folder.iterdir()):
                raise InputError(f"--out {folder}: holds other files than a run's; name another")
            with replacing(self.log_path) as temporary:
                temporary.write_text(json.dumps({"settings": new}) + "\n")
        old = json.loads(self.log_path.read_text().partition("\n")[0])["settings"]
        changed = [key for key in old | new if key not in FREE and old.get(key) != new.get(key)]
        faults = [f"{k}: was {old.get(k)}, now {new.get(k)}" for k in changed]
        if faults:
            what = "holds a run with other settings; give its settings, or another --out"
            raise InputError.of(f"{folder} {what}", faults)

    def resume(self, model: nn.Module, optimizer, scaler) -> None:
        """Go on from last.pt, if there is one; the log is cut to its step."""
        if self.last_path.exists():
            try:
                saved = torch.load(self.last_path, "cpu", weights_only=True, mmap=True)
                state = saved["training"]
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(state["optimizer"])
                scaler.load_state_dict(state["scaler"])
            except Exception as error:  # torch.load raises whatever its parsers meet
                raise InputError(f"{self.last_path}: is damaged; name another --out") from error
            self.step, self.validated = state["step"], state["validated"]
            self.best, self.losses = state["best"], state["losses"]
        if RANK == 0:
            first, *lines = self.log_path.read_text().splitlines(keepends=True)
            lines = [line for line in lines if line.endswith("\n") and self._past(json.loads(line))]
            with replacing(self.log_path) as temporary:
                temporary.write_text("".join([first, *lines]))

    def _past(self, line: dict) -> bool:
        return line["step"] <= (self.validated if "validation" in line else self.step)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Note the losses of a step that has been made."""
        self.pending.append({name: value.detach() for name, value in losses.items()})
        self.step += 1

    def mean_losses(self, last: int | None = None) -> dict[str, float]:
        """Over the last so many steps of the epoch, or all; a loss not finite is an InputError."""
        for step, losses in enumerate(self.pending, start=self.step - len(self.pending) + 1):
            self.losses.append({name: value.item() for name, value in losses.items()})
            if not math.isfinite(self.losses[-1]["loss"]):
                raise InputError(f"step {step}: the loss is {self.losses[-1]['loss']}; {STOPPED}")
        self.pending = []
        chosen = self.losses[-last:] if last else self.losses
        return {name: sum(v[name] for v in chosen) / len(chosen) for name in chosen[0]}

    def log(self, **values) -> None:
        if RANK == 0:
            with open(self.log_path, "a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")

    def save(self, model: nn.Module, optimizer, scaler) -> None:
        """Write last.pt, unless a loss, or a weight after a finite loss, is not finite."""
        if self.pending:
            self.mean_losses()
        if not all(weights.isfinite().all() for weights in model.parameters()):
            raise InputError(f"step {self.step}: its weights are not finite; {STOPPED}")
        training = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        training |= {key: getattr(self, key) for key in ("step", "validated", "best", "losses")}
        if RANK == 0:
            save_atomically(model.checkpoint() | {"training": training}, self.last_path)

"""What a run leaves on disk, and how the same command goes on from it.

    runs/NAME/log.jsonl   first line: every setting; then a JSON object per step interval and epoch
    runs/NAME/last.pt     the state of the run: loadable as a model, and all that resuming needs
    runs/NAME/best.pt     the model of the best epoch by validation mAP@10
    runs/NAME/curves.svg  loss, learning rate and validation mAP@10, drawn after every epoch

The log holds no times: a run that was interrupted and resumed writes the same lines as one that was
left alone.
"""

import glob
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dualenc import InputError, replacing
from dualenc.model import read_checkpoint

# Settings that may differ between a run and its resumption: they do not change the mathematics.
FREE_SETTINGS = frozenset({
    "out", "data_dir", "cache_dir", "teacher_cache", "device", "workers", "epochs", "max_steps",
    "checkpoint_every", "micro_batch", "compile",
})


class Run:
    """A run folder.

    Args:
        folder: made if it is not there.
        settings: plain values; they become the log's first line.
        writes: whether this process is the one that writes; in the others log and save do nothing.

    Raises:
        InputError: the folder holds something else, or a run with other settings.
    """

    def __init__(self, folder: Path, settings: dict, writes: bool = True):
        self.folder, self.writes = folder, writes
        self.log_path = folder / "log.jsonl"
        self.last, self.best = folder / "last.pt", folder / "best.pt"
        # As JSON reads them back: tuples are lists, paths are strings.
        self.settings = json.loads(json.dumps(settings, default=str))
        if writes:
            self._open()

    def _open(self) -> None:
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {folder}: is a file, not a folder")
        if self.log_path.exists():
            self._refuse_changes()
        elif folder.exists() and any(p for p in folder.iterdir() if not p.name.startswith(".")):
            raise InputError(f"--out {folder}: holds other files than a run's; name another folder")
        else:
            with replacing(self.log_path) as temporary:
                temporary.write_text(json.dumps(self.settings) + "\n")
        for unfinished in folder.glob(".*.tmp"):  # of a process killed while it wrote
            unfinished.unlink(missing_ok=True)

    def _refuse_changes(self) -> None:
        try:
            with open(self.log_path, encoding="utf-8") as file:
                old = json.loads(file.readline())
            names = dict.fromkeys([*old, *self.settings])
        except (ValueError, TypeError) as error:
            raise InputError(f"--out {self.folder}: its log.jsonl is not a run's log") from error
        changes = [
            f"--{name.replace('_', '-')}: was {old.get(name)}, now {self.settings.get(name)}"
            for name in names
            if name not in FREE_SETTINGS and old.get(name) != self.settings.get(name)
        ]
        if changes:
            raise InputError.of(
                f"{self.folder} holds a run with other settings; give its settings, or another "
                "--out",
                changes,
            )

    def load_state(self) -> dict | None:
        """What save_state saved last; the log is cut back to where it was then."""
        state, log_bytes = None, None
        if self.last.exists():
            checkpoint = read_checkpoint(self.last)
            state = checkpoint["training"] | {"model": checkpoint["model"]}
            log_bytes = checkpoint["log_bytes"]
        if self.writes:
            with open(self.log_path, "rb+") as file:
                file.truncate(len(file.readline()) if log_bytes is None else log_bytes)
        return state

    def save_state(self, model_checkpoint: dict, training: dict) -> None:
        """Write last.pt: a model's checkpoint, the training state, and the log's length."""
        if not self.writes:
            return
        state = model_checkpoint | {
            "training": training,
            "log_bytes": self.log_path.stat().st_size,
        }
        with replacing(self.last) as temporary:
            torch.save(state, temporary)

    def save_best(self, model_checkpoint: dict, metrics: dict[str, float], epoch: int) -> None:
        if not self.writes:
            return
        with replacing(self.best) as temporary:
            torch.save(model_checkpoint | {"validation": metrics, "epoch": epoch}, temporary)

    def log(self, **values) -> None:
        if not self.writes:
            return
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def newest_best(runs: Path = Path("runs")) -> Path:
    """The best.pt that was written last below the folder of runs."""
    found = sorted(runs.glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"{runs}: no run with a best.pt here; train first, or give --checkpoint")
    return found[-1]


def best_of(runs: Sequence[str]) -> list[Path]:
    """Run folders, checkpoints, or patterns of them -> the checkpoints, of a folder its best.pt.

    Raises:
        InputError: nothing is there, or fewer than two, of which there is no deviation.
    """
    found: dict[Path, Path] = {}
    for pattern in runs:
        paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
        if not paths:
            raise InputError(f"--seeds {pattern}: no such run or checkpoint")
        for path in map(Path, paths):
            path = path / "best.pt" if path.is_dir() else path
            found.setdefault(path.resolve(), path)
    if len(found) < 2:
        raise InputError(f"--seeds: only {next(iter(found.values()))}; give two runs or more")
    return list(found.values())

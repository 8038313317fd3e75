"""What a run leaves on disk, and how the same command goes on from it.

    runs/NAME/log.jsonl   first line: every setting; then a JSON object per step interval and epoch
    runs/NAME/last.pt     the state of the run: loadable as a model, and all that resuming needs
    runs/NAME/best.pt     the model of the best epoch by validation mAP@10
    runs/NAME/curves.svg  loss, learning rate and validation mAP@10, drawn after every epoch
    runs/NAME/.lock       empty: locked by the process that writes all of these

The log holds no times: a run that was interrupted and resumed writes the same lines as one that was
left alone.
"""

import fcntl
import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path

from dualenc import InputError, replacing
from dualenc.checkpoints import read_checkpoint, write_tensors

# Settings that may differ between a run and its resumption: they do not change the mathematics.
FREE_SETTINGS = frozenset({
    "out", "data_dir", "cache_dir", "device", "workers", "epochs", "max_steps",
    "checkpoint_every", "log_every", "micro_batch",
})


def recorded_setting(folder: Path, name: str) -> str | None:
    """A setting of the run in a folder, if there is one."""
    try:
        with open(folder / "log.jsonl", encoding="utf-8") as file:
            return json.loads(file.readline()).get(name)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # no run, or another program's file: Run says so


def check_folder(folder: Path) -> None:
    """See, before long work, that a run can be written to a folder.

    Raises:
        InputError: it is a file, holds something else, or may not be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file, not a folder")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(f"--out {folder}: {there} cannot be written to; name another folder")
    if folder.exists() and not (folder / "log.jsonl").exists():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError(f"--out {folder}: holds other files than a run's; name another folder")


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
        check_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        if self.log_path.exists():
            self._refuse_changes()
        else:
            with replacing(self.log_path) as temporary:
                temporary.write_text(json.dumps(self.settings) + "\n")
        for name in ("log.jsonl", "last.pt", "best.pt", "curves.svg"):
            for unfinished in self.folder.glob(f".{name}.*.tmp"):  # of a process that was killed
                unfinished.unlink(missing_ok=True)

    def _lock(self) -> None:
        """Keep other processes out for as long as this one lives; it is never closed.

        Forked workers do not inherit such a lock. It would be lost with any descriptor of its file
        that is closed, so that file is one which nothing else opens.
        """
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"--out {self.folder}: another process is writing to this run; wait for it, or "
                "name another folder"
            ) from error

    def _refuse_changes(self) -> None:
        try:
            with open(self.log_path, encoding="utf-8") as file:
                old = json.loads(file.readline())
            old, new = _named(old), _named(self.settings)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise InputError(f"--out {self.folder}: its log.jsonl is not a run's log") from error
        changes = [
            f"{name}: was {_shown(old.get(name))}, now {_shown(new.get(name))}"
            for name in dict.fromkeys([*old, *new])
            if old.get(name) != new.get(name)
        ]
        if old.get("--preset") != new.get("--preset"):  # the sizes follow from it
            changes = [change for change in changes if not change.startswith("the model's")]
        if changes:
            raise InputError.of(
                f"{self.folder} holds a run with other settings; give its settings, or another "
                "--out",
                changes,
            )

    def load_state(self) -> dict | None:
        """What save_state saved last, if anything, with the model and the log's length.

        Raises:
            InputError: the file is damaged, or does not belong to this run.
        """
        if not self.last.exists():
            return None
        checkpoint = read_checkpoint(self.last)
        missing = {"training", "model", "log_bytes"} - checkpoint.keys()
        if missing:
            raise InputError(f"{self.last}: is no run's state: it has no {min(missing)}")
        state, log_bytes = checkpoint["training"], checkpoint["log_bytes"]
        fault = _fault_of(state)
        if type(log_bytes) is not int or log_bytes < self._settings_bytes():
            fault = "its log_bytes is wrong"
        if fault:
            raise InputError(f"{self.last}: is not this run's state ({fault})")
        if self.log_path.stat().st_size < log_bytes:
            raise InputError(f"{self.log_path}: is shorter than when {self.last} was written")
        return state | {"model": checkpoint["model"], "log_bytes": log_bytes}

    def cut_log(self, state: dict | None) -> None:
        """Cut the log back to where it was when a state was saved, or to the settings."""
        if self.writes:
            os.truncate(self.log_path, state["log_bytes"] if state else self._settings_bytes())

    def _settings_bytes(self) -> int:
        with open(self.log_path, "rb") as file:
            return len(file.readline())

    def save_state(self, model_checkpoint: dict, training: dict) -> None:
        """Write last.pt: a model's checkpoint, the training state, and the log's length."""
        if not self.writes:
            return
        with open(self.log_path, "rb") as file:
            os.fsync(file.fileno())  # what last.pt speaks of must be on the disk before it
            log_bytes = file.seek(0, os.SEEK_END)
        state = model_checkpoint | {"training": training, "log_bytes": log_bytes}
        write_tensors(state, self.last)

    def save_best(self, model_checkpoint: dict, metrics: dict[str, float], epoch: int) -> None:
        if self.writes:
            write_tensors(model_checkpoint | {"validation": metrics, "epoch": epoch}, self.best)

    def log(self, **values) -> None:
        if not self.writes:
            return
        try:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:  # a disk that is full does not name the file
            raise InputError(f"{self.log_path}: cannot be written ({error.strerror})") from error


STATE = {"step": int, "best": float, "losses": list, "optimizer": dict, "scaler": dict}


def _fault_of(state) -> str | None:
    """What is wrong with the training state of a last.pt; the optimizer looks at its own part."""
    if not isinstance(state, dict):
        return "it holds none"
    for name, kind in STATE.items():
        if type(state.get(name)) is not kind:
            return f"its {name} is no {kind.__name__}"
    if state["step"] not in range(2**63):
        return "its step is out of range"
    for losses in state["losses"]:
        if not (isinstance(losses, dict) and losses.keys() == state["losses"][0].keys()):
            return "its losses are not those of steps"
        if "loss" not in losses or not all(type(v) is float for v in losses.values()):
            return "its losses are not numbers"
    return None


def _named(settings: dict) -> dict:
    """Each setting by the name that a user knows it by."""
    named = {}
    for name, value in settings.items():
        if name == "data":
            named |= {f"clips, captions and digest of {split}": v for split, v in value.items()}
        elif name == "model":
            options = {key: value[key] for key in ("preset", "tau", "learn_tau")}
            named |= {_option(key): v for key, v in options.items()}
            named |= {f"the model's {k}": v for k, v in value.items() if k not in options}
        elif name not in FREE_SETTINGS:
            named[_option(name)] = value
    return named


def _option(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _shown(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)  # tau is kept in float32


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

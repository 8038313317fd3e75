"""Checkpoints: ours and the official baseline's, read, checked and saved; PaSST's weights."""

import collections
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dualenc.errors import InputError, replacing

AnyPath = str | os.PathLike
PASST_URL = (
    "https://github.com/kkoutini/PaSST/releases/download/v0.0.2-audioset/"
    "passt-s-f128-p16-s16-ap.468.pt"
)


def checkpoint_file(name_or_path: AnyPath) -> Path:
    """The file that a path names: a run's folder stands for its best.pt."""
    path = Path(name_or_path)
    return path / "best.pt" if path.is_dir() else path


def read_checkpoint(path: AnyPath) -> dict:
    """What a checkpoint file holds, memory-mapped; the official baseline's is given our form.

    It is an InputError where the file is missing, damaged, of another program or version.
    """
    path = checkpoint_file(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        # Lightning stores objects of other programs beside the weights: each becomes a dictionary.
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in others]):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "state_dict" in saved:
            return _from_baseline(saved)
        saved["config"]
        return saved
    except Exception as error:  # torch.load raises whatever its parsers meet
        why = (str(error) or repr(error)).splitlines()[0][:80]
        raise InputError(f"{path}: is damaged or not this program's checkpoint ({why})") from error


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], source) -> None:
    """Load weights whose names and shapes are the module's; else an InputError names one."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:100]
        raise InputError(f"{source}: its weights do not fit the model: {reason}") from error


class _Inert:  # stands for any class that a file names
    def __new__(cls, *args) -> collections.OrderedDict:  # which takes both items and attributes
        return collections.OrderedDict()


BASELINE_NAMES = {  # where a weight's name begins in the baseline's file, and in ours
    "tau": "tau", "audio_embedding_model.model.model.": "audio.passt.",
    "audio_projection.": "audio_projection.", "text_embedding_model.": "text.roberta.",
    "text_projection.": "text_projection.",
}


def _from_baseline(saved: dict) -> dict:
    """PyTorch Lightning's checkpoint of the official DCASE 2025 baseline in the form of ours."""
    weights = {}
    for name, value in saved["state_dict"].items():
        name = name.replace("_orig_mod.", "")  # torch.compile's
        theirs = next(prefix for prefix in BASELINE_NAMES if name.startswith(prefix))
        weights[BASELINE_NAMES[theirs] + name.removeprefix(theirs)] = value
    weights = {n: w for n, w in weights.items() if not n.startswith("audio.passt.head")}  # classes
    weights["tau"] = weights["tau"].abs().reshape(())  # by whose absolute value it divides
    # It always trains on Clotho; its hyperparameters say whether the others were left out.
    settings = saved.get("hyper_parameters", {})
    seen = [f"{n}/train" for n in ("audiocaps", "wavcaps") if settings.get(n, True) is not False]
    return {
        "sizes": {"tau": weights["tau"].item()}, "tokenizer": None, "model": weights,
        "trained_on": ["clotho/development", *seen], "stage": "contrastive",
    }


def newest_checkpoint(runs: Path = Path("runs")) -> Path:
    """The best.pt that was written last below the folder of runs."""
    if found := sorted(runs.rglob("best.pt"), key=lambda path: path.stat().st_mtime):
        return found[-1]
    raise InputError(f"{runs}: no run with a best.pt here; train first, or give --checkpoint")


def save_atomically(values: dict, path: Path) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(values, file)
        except RuntimeError as error:  # a full disk is named in the error behind torch's own
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def published_passt() -> dict[str, Tensor]:
    """The published PaSST weights, downloaded once into torch's hub folder."""
    try:
        weights = torch.hub.load_state_dict_from_url(
            PASST_URL, map_location="cpu", weights_only=True
        )
    except OSError as error:
        raise InputError(f"PaSST's weights cannot be fetched ({error}): copy {PASST_URL} into "
                         f"{torch.hub.get_dir()}/checkpoints, or give --init random") from error
    # head.*, head_dist.*: AudioSet's 527 classes
    return {name: value for name, value in weights.items() if not name.startswith("head")}

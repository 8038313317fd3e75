"""Checkpoints: which file a name means, what is in it, and how one is saved.

A checkpoint of this project is what DualEncoder.checkpoint() returns, saved by torch. Two published
models of the same recipe can be read, too, and are fetched when they are asked for by name:

    salsa      Primus et al., "Estimated audio-caption correspondences" (DCASE 2024 workshop)
    baseline   the official baseline of DCASE 2025, task 6 (called the baseline from here on)
"""

import collections
import contextlib
import os
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dualenc.errors import InputError, first_line, replacing

AnyPath = str | os.PathLike


# --- Published weights: fetched once into torch's hub folder ---

CHUNK_BYTES = 2**20  # read from a server at a time
TIMEOUT_SECONDS = 30  # without a byte from the server


class Published(NamedTuple):
    """Weights that their authors publish, as one file or in parts."""

    title: str
    file_name: str  # in torch's hub folder
    urls: tuple[str, ...]  # one for each part; the parts are joined in this order
    alternative: str = ""  # ends the message if they cannot be fetched

    def path(self) -> Path:
        return Path(torch.hub.get_dir(), "checkpoints", self.file_name)


JKU = "https://cloud.cp.jku.at/index.php/s"
SALSA_SHARES = (
    "pMWRbJzXqFPPzgD", "aMDLmLTZH4jCHwq", "3kKiQJFk45R7S5k", "ijLwzPAQrqKRf5P", "Np4A5nobAkaSGpY",
)
PUBLISHED = {
    "salsa": Published(
        "the model salsa", "salsa_passt_roberta.ckpt",
        tuple(
            f"{JKU}/{share}/download/passt_roberta.{number}.ckpt"
            for number, share in enumerate(SALSA_SHARES, start=1)
        ),
    ),
    "baseline": Published(
        "the DCASE 2025 baseline", "dcase2025_task6_baseline.ckpt",
        (f"{JKU}/6ZTQ3mcwk9AAS4i/download",),
    ),
}
PASST = Published(
    "PaSST", "passt-s-f128-p16-s16-ap.468.pt",
    ("https://github.com/kkoutini/PaSST/releases/download/v0.0.2-audioset/"
     "passt-s-f128-p16-s16-ap.468.pt",),
    alternative=", or give --init random",
)


def checkpoint_file(name_or_path: AnyPath) -> Path:
    """Return the file that a checkpoint's name or path means, fetched if need be.

    Args:
        name_or_path: a file; a run's folder, which stands for its best.pt; or "salsa" or
            "baseline", unless a file or folder has that name.

    Raises:
        InputError: there is no such file, or it cannot be fetched.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "best.pt"
    elif not path.exists() and str(path) in PUBLISHED:
        path = _fetch(PUBLISHED[str(path)])
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    return path


def published_passt() -> dict[str, Tensor]:
    """Return PaSST's published weights without its classifiers, fetched if need be."""
    weights = _read(_fetch(PASST))
    # The classifiers of AudioSet's 527 classes are called head.* and head_dist.*.
    return {name: value for name, value in weights.items() if not name.startswith("head")}


def _fetch(published: Published) -> Path:
    """Return the file of published weights, downloaded if it is not there yet.

    torch.hub's own downloader takes a file that broke off for a whole one. Here the file gets its
    name only when each part has the size that the server told, and all of it can be read.
    """
    path = published.path()
    if path.exists():
        return path
    sizes = []
    for url in published.urls:
        with _answer(published, url) as response:
            sizes.append(response.length)
    total = None if None in sizes else sum(sizes)
    size = "" if total is None else f", {total / 1e6:,.0f} MB"
    print(f"fetching {published.title} from {published.urls[0]}{size}", file=sys.stderr)
    bar = tqdm(
        desc=published.file_name, total=total, unit="B", unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    with replacing(path, by_many=True) as temporary:
        with open(temporary, "wb") as file, bar:
            for url in published.urls:
                for chunk in _download(published, url):
                    file.write(chunk)
                    bar.update(len(chunk))
        try:
            _load(temporary)
        except Exception as error:  # torch.load passes on whatever its parsers raise.
            reason = "what it sent is no whole checkpoint"
            raise _not_fetched(published, published.urls[-1], reason) from error
    return path


def _download(published: Published, url: str) -> Iterator[bytes]:
    """Yield what a server sends; an InputError if that is less than it told."""
    with _answer(published, url) as response:
        missing = response.length
        while chunk := response.read(CHUNK_BYTES):
            if missing is not None:
                missing -= len(chunk)
            yield chunk
    if missing:
        raise _not_fetched(published, url, f"it broke off, {missing:,} bytes before its end")


@contextlib.contextmanager
def _answer(published: Published, url: str) -> Iterator[HTTPResponse]:
    """Open an address; the response's length is None if the server does not tell it."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            yield response
    except (OSError, HTTPException) as error:
        raise _not_fetched(published, url, first_line(error)) from error


def _not_fetched(published: Published, url: str, reason: str) -> InputError:
    return InputError(
        f"{published.title} cannot be fetched from {url} ({reason[:120]}); nothing was kept: run "
        f"again, or copy it to {published.path()} yourself{published.alternative}"
    )


# --- Reading ---

def read_checkpoint(name_or_path: AnyPath) -> dict:
    """Read a checkpoint, memory-mapped; the published ones are brought into this project's form.

    Returns:
        A dictionary of
            "config": DualEncoderConfig's values by name; the absent ones are the report's.
            "tokenizer": as JSON, or None if the checkpoint holds none.
            "model": {name: weights}.
            "trained_on": names of splits, such as "clotho/development".
            "stage": "contrastive" or "distilled".
            "training": in last.pt alone, what resuming needs.

    Raises:
        InputError: the file is missing, damaged, or of another program.
    """
    path = checkpoint_file(name_or_path)
    saved = _read(path)
    if isinstance(saved, dict) and "state_dict" in saved:
        return _from_lightning(saved, path)
    if not isinstance(saved, dict) or "config" not in saved:
        raise InputError(f"{path}: is no checkpoint of dualenc, salsa or the baseline")
    return saved


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], source: AnyPath) -> None:
    """Load weights; an InputError if their names and shapes are not all those of the module."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:100]
        raise InputError(f"{source}: its weights do not fit the model: {reason}") from error


def _read(path: Path) -> object:
    try:
        return _load(path)
    except Exception as error:  # torch.load passes on whatever its parsers raise.
        reason = first_line(error)[:80]
        remedy = ""
        if path.parent == PASST.path().parent:  # torch's hub folder, to which all is fetched
            remedy = "; delete it and run again, and it is fetched anew"
        raise InputError(f"{path}: is damaged or no checkpoint ({reason}){remedy}") from error


def _load(path: Path) -> object:
    # PyTorch Lightning stores objects of other programs beside the weights. Each becomes a
    # dictionary.
    others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(_StandIn, name) for name in others]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class _StandIn:
    """A stand-in for any class that a file names, so that no code of that class is run."""

    def __new__(cls, *args) -> collections.OrderedDict:
        return collections.OrderedDict()  # It accepts both items and attributes.


# --- The two published models, as PyTorch Lightning saved them ---

# {how names of weights begin in salsa's or the baseline's file: how they begin here}
PUBLISHED_NAMES = {
    "audio_embedding_model.model.model.": "audio.passt.",
    "text_embedding_model.": "text.roberta.",  # baseline
    "sentence_embedding_model.": "text.roberta.",  # salsa
    "audio_projection.": "audio_projection.",  # baseline
    "project_audio.0.": "audio_projection.",  # salsa
    "text_projection.": "text_projection.",  # baseline
    "project_sentence.0.": "text_projection.",  # salsa
}
# PaSST's classifiers, and parts of salsa that its published model does not use.
PASSED_OVER = (
    "audio_embedding_model.model.model.head.", "audio_embedding_model.model.model.head_dist.",
    "timing_tau", "audio_token", "posencode.", "audio_sequence.", "audio_output_projection.",
)
HEAD_WIDTH = 64  # values of one attention head, in PaSST and in every RoBERTa


def _from_lightning(saved: dict, path: Path) -> dict:
    """Bring the checkpoint of salsa or of the baseline into this project's form."""
    weights = {}
    stage = "contrastive"
    for name, value in saved["state_dict"].items():
        name = name.replace("_orig_mod.", "")  # torch.compile adds it.
        if name.startswith(PASSED_OVER):
            continue
        weights[_our_name(name, path)] = value
        if name.startswith("project_audio."):  # Only salsa has it, and it is a student.
            stage = "distilled"
    try:
        sizes = _sizes(weights)
    except KeyError as error:
        raise InputError(f"{path}: lacks the weight {error.args[0]}") from error
    weights["tau"] = torch.tensor(sizes["tau"])  # its absolute value
    # Both were trained on Clotho. They were trained on AudioCaps and WavCaps as well, unless their
    # settings say that these were left out.
    settings = saved.get("hyper_parameters", {})
    trained_on = ["clotho/development"]
    for dataset in ("audiocaps", "wavcaps"):
        if settings.get(dataset, True) is not False:
            trained_on.append(f"{dataset}/train")
    return {
        "config": sizes, "tokenizer": None, "model": weights, "trained_on": trained_on,
        "stage": stage,
    }


def _our_name(name: str, path: Path) -> str:
    if name == "tau":
        return name
    for prefix, our_prefix in PUBLISHED_NAMES.items():
        if name.startswith(prefix):
            return our_prefix + name.removeprefix(prefix)
    raise InputError(f"{path}: holds a weight that no model known here has: {name}")


def _sizes(weights: Mapping[str, Tensor]) -> dict:
    """Read the model's sizes off the weights' shapes, by DualEncoderConfig's names."""
    roberta = "text.roberta."
    audio_width, _, *patch = weights["audio.passt.patch_embed.proj.weight"].shape
    vocab_size, hidden_size = weights[roberta + "embeddings.word_embeddings.weight"].shape
    return {
        "audio_width": audio_width,
        "audio_depth": _count(weights, "audio.passt.blocks."),
        "audio_heads": audio_width // HEAD_WIDTH,
        "patch": tuple(patch),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(weights, roberta + "encoder.layer."),
        "num_attention_heads": hidden_size // HEAD_WIDTH,
        "intermediate_size": len(weights[roberta + "encoder.layer.0.intermediate.dense.weight"]),
        "max_position_embeddings": len(weights[roberta + "embeddings.position_embeddings.weight"]),
        "embedding": len(weights["audio_projection.weight"]),
        "tau": abs(weights["tau"].item()),  # Both divide by its absolute value.
    }


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Count the layers whose names are the prefix and a number."""
    numbers = {
        name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)
    }
    return len(numbers)


# --- The newest checkpoint, and saving ---

def newest_checkpoint(runs: Path = Path("runs")) -> Path:
    """Return the best.pt that was written last below the folder of runs."""
    checkpoints = list(runs.rglob("best.pt"))
    if not checkpoints:
        raise InputError(
            f"{runs}: no run with a best.pt here; train first, or give --checkpoint (--checkpoint "
            "salsa fetches a published model)"
        )
    return max(checkpoints, key=lambda path: path.stat().st_mtime)


def save_atomically(values: object, path: Path, by_many: bool = False) -> None:
    """Save values by torch.save; the file that was there stays until all is written.

    by_many says that several processes may write it at once, as in errors.replacing.
    """
    with replacing(path, by_many) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(values, file)
        except RuntimeError as error:
            # torch turns a full disk into an error of its own, which hides the system's.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

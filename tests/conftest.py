"""What several tests share: sounds written by the standard library, a tiny model, small data."""

import csv
import functools
import os
import signal
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dualenc import DualEncoder  # noqa: E402
from dualenc.decoding import to_int16  # noqa: E402

# More threads than one gain nothing on two cores, and wait for each other where cores are shared:
# with another suite beside it, this one took 282 s with one thread, and 527 s with two.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
CAPTIONS = ["a dog barks twice", "rain falls on a roof", "birds sing while a train passes by"]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module", autouse=True)
def restored_signals():
    """Restore the handlers of Ctrl-C and SIGTERM, which train.main sets, after a file's tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- Files ---


def touch(*paths: Path) -> None:
    """Make empty files, and the folders in which they lie."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_wav(path: Path, waveform: np.ndarray, rate: int = 32_000) -> Path:
    """Write (n,) or (n, channels), float in -1..1, as a 16-bit wav file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if waveform.ndim == 1 else waveform.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(to_int16(waveform).tobytes())
    return path


def noise(seconds: float, seed: int = 0, rate: int = 32_000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(round(seconds * rate))).clip(-1, 1).astype(np.float32)


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_annotations(path: Path, rows: list[list[str]]) -> Path:
    """Write new annotations: a query and its relevant files, a list or one name, in each row."""
    return write_csv(path, ["query", "audio_filenames"], rows)


def write_folder(folder: Path, clips: int, captions: int = 2, seconds: float = 1.0) -> Path:
    """Write a folder of one's own: sounds of noise and a captions.csv."""
    rows = []
    for i in range(clips):
        write_wav(folder / f"{i}.wav", noise(seconds, seed=i))
        rows.append([f"{i}.wav", *(f"sound {i} number {j}" for j in range(captions))])
    header = ["file_name", *(f"caption_{j}" for j in range(captions))]
    write_csv(folder / "captions.csv", header, rows)
    return folder


# --- Models and training ---


@pytest.fixture(scope="session")
def tiny_model() -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder.create("tiny", "random", CAPTIONS).eval()


def make_comparable(set_attribute: Callable) -> None:
    """Have two ways of training take the same steps, up to rounding.

    Dropout, patchout and jitter are off; and Adam, with a larger epsilon, does not make a whole
    step of a gradient that is rounding.

    Args:
        set_attribute: setattr, or the one of a monkeypatch.
    """

    def stay_in_evaluation_mode(model, mode=True):
        return nn.Module.train(model, False)

    set_attribute(DualEncoder, "train", stay_in_evaluation_mode)
    set_attribute(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-5))


def note_draws(set_attribute: Callable) -> list[float]:
    """Return a list that receives, at every training step, a number that dropout might draw."""
    draws = []
    encode_pairs = DualEncoder.encode_pairs

    def encode_and_draw(self, *arguments):
        with torch.random.fork_rng(devices=[]):
            draws.append(torch.rand(1).item())
        return encode_pairs(self, *arguments)

    set_attribute(DualEncoder, "encode_pairs", encode_and_draw)
    return draws

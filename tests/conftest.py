"""Small data and models that several test files share."""

import os
import sys

import numpy as np
import pytest
import soundfile

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more, and cores are shared
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # data workers fork
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched while testing

from dualenc import run  # noqa: E402
from dualenc.miniature import write_miniature  # noqa: E402
from dualenc.model import DualEncoder  # noqa: E402

CAPTIONS = ["A dog barks loudly, twice.", "Rain falls on a tin roof", "A bell rings and fades away"]


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """A folder with a very small Clotho and AudioCaps in their real layouts."""
    folder = tmp_path_factory.mktemp("miniature")
    write_miniature(folder, seed=0, clotho=(10, 4, 6), audiocaps=(6, 2, 2))
    return folder


@pytest.fixture
def tiny():
    """A tiny model with random weights."""
    import torch

    torch.manual_seed(0)
    return DualEncoder.create("tiny", "random", CAPTIONS * 4).eval()


@pytest.fixture(scope="session")
def noise():
    """Ten waveforms of 0.03 to 35 s, (n,) float32 at 32 kHz."""
    rng = np.random.default_rng(0)
    seconds = (0.03, 4, 9.99, 10, 10.05, 10.2, 20, 23, 30, 35)
    return [(0.1 * rng.standard_normal(int(s * 32_000))).astype(np.float32) for s in seconds]


@pytest.fixture
def write_sound(tmp_path):
    """A function that writes samples (n,) or (n, channels) to a file and returns its path."""

    def write(name, samples, rate=32_000, **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, rate, **options)
        return path

    return write


@pytest.fixture
def command(miniature, tmp_path, monkeypatch, capfd):
    """A function that runs a script's main as its command would; returns (status, output)."""
    monkeypatch.chdir(tmp_path)

    def call(script, *arguments):
        device = ["--device", "cpu", "--precision", "fp32"]
        data = ["--data-dir", miniature, "--cache-dir", tmp_path / "cache"]
        argv = [f"{script.__name__}.py", *data, *device, *arguments]
        monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
        with pytest.raises(SystemExit) as ended:
            run(script.main)
        printed = capfd.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    return call

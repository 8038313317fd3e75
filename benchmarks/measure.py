"""What the benchmarks share: two sides taken in turn, their medians, and the machine's name."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchaudio
import transformers

from dualenc.audio import SAMPLE_RATE, cut
from dualenc.data import Batch

WORDS = "a dog barks while rain falls on the roof and someone walks over gravel far away".split()


def machine(device: torch.device) -> str:
    """One line: processor or GPU, cores, versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), "CPU")
        name = f"{model}, {torch.get_num_threads()} threads"
    return (
        f"{name}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchaudio {torchaudio.__version__}, transformers {transformers.__version__}"
    )


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def medians(
    sides: dict[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, float]:
    """Call the sides in turn, round after round: whatever slows the machine slows all of them."""
    times = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        for name, function in sides.items():
            elapsed = seconds(function, device)
            if turn >= warm_up:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices, measured here and now."""
    size = 8192 if device.type == "cuda" else 2048  # what a GPU does in far more than a call takes
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    times = [seconds(lambda: a @ b, device) for _ in range(10)]
    return 2 * size**3 / statistics.median(times)


def random_clips(durations: list[float], seed: int = 0) -> list[np.ndarray]:
    """Noise of these lengths in seconds: (n,) int16 each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-3000, 3000, int(s * SAMPLE_RATE), dtype=np.int16) for s in durations]


def random_captions(count: int, seed: int = 0) -> list[str]:
    """Captions of 8 to 20 words, as Clotho's."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(8, 21))) for _ in range(count)]


def batch_of(clips: list[np.ndarray], tokens: torch.Tensor) -> Batch:
    """One pair of each clip and row of tokens, packed."""
    segments = [cut(clip) for clip in clips]
    ids = torch.arange(len(clips))
    return Batch(
        segments=torch.from_numpy(np.concatenate(segments)),
        counts=torch.tensor([len(s) for s in segments]),
        clip_of_pair=ids, tokens=tokens, clip_ids=ids, pair_ids=ids, sizes=[len(clips)],
    )

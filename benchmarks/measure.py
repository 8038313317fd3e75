"""What the benchmarks share: sizes, options, comparing in turns, the machine, random data."""

import argparse
import platform
import statistics
import sys
import time
import wave
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are run as scripts

from dualenc.audio import to_segments
from dualenc.data import Batch
from dualenc.decoding import SAMPLE_RATE

PAIRS = 64  # pairs of a batch, the default of train.py
TOKENS = 24  # the longest caption of a batch, as a rule
CLOTHO_CLIPS = 3839  # clips of Clotho's training split
CLOTHO_PAIRS = 19_195  # their captions
WORDS = "a dog barks while rain falls on the roof and someone walks over gravel far away".split()


def options(description: str, **defaults) -> argparse.Namespace:
    """Parse options whose types and defaults are given: options(__doc__, rounds=3) has --rounds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    return parser.parse_args()


def machine(device: torch.device) -> str:
    """Return the name of the card, or of the CPU with its threads, and the versions."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return f"{hardware}; Python {platform.python_version()}, torch {torch.__version__}"


def cpu_name() -> str:
    """Return the CPU's name as Linux tells it, or else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def seconds_of(work: Callable, rounds: int = 1) -> float:
    """Return the seconds that one call takes, the mean of so many; a GPU is waited for."""
    synchronise()
    start = time.perf_counter()
    for _ in range(rounds):
        work()
    synchronise()
    return (time.perf_counter() - start) / rounds


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(rounds: int, sides: dict[str, Callable]) -> dict[str, float]:
    """Time each side in turn, and print its median and how many times as fast as the first it is.

    The sides take turns, since a shared machine's speed drifts. A first round is not counted.

    Returns:
        {name of a side: its median in seconds}.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 + rounds):
        for name, side in sides.items():
            seconds[name].append(seconds_of(side))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"  {name:28}{median:10.4f} s{first / median:8.2f} times", flush=True)
    return medians


# --- Random data ---

def random_clips(durations_s: Sequence[float]) -> list[np.ndarray]:
    """Return a clip of noise for each duration: (n,) int16."""
    rng = np.random.default_rng(0)
    clips = []
    for duration_s in durations_s:
        samples = int(duration_s * SAMPLE_RATE)
        clips.append(rng.integers(-3000, 3000, samples, dtype=np.int16))
    return clips


def write_noise(
    folder: Path, clips: int, shortest_s: float, longest_s: float, rate: int, channels: int
) -> list[Path]:
    """Write clips of noise as 16-bit wav files into a folder, and return their paths."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(clips):
        samples = int(rng.uniform(shortest_s, longest_s) * rate)
        waveform = rng.integers(-3000, 3000, (samples, channels), dtype=np.int16)
        path = folder / f"{i}.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(waveform.tobytes())
        paths.append(path)
    return paths


def random_captions(count: int) -> list[str]:
    """Return captions of 8 to 20 words, as long as Clotho's are."""
    rng = np.random.default_rng(0)
    captions = []
    for _ in range(count):
        words = rng.choice(WORDS, rng.integers(8, 21))
        captions.append(" ".join(words))
    return captions


def batch_of(clips: list[np.ndarray], tokens: torch.Tensor) -> Batch:
    """Make a batch that pairs each clip with one row of tokens (B, L)."""
    segments, counts = to_segments(clips)
    ids = torch.arange(len(clips))
    return Batch(
        segments=segments, counts=counts, clip_rows=ids, tokens=tokens, clip_ids=ids, pair_ids=ids
    )

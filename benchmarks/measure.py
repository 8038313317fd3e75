"""What the benchmarks share: options, sides taken in turn, the machine's name, noise."""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from dualenc.audio import to_segments
from dualenc.data import Batch
from dualenc.decoding import SAMPLE_RATE

WORDS = "a dog barks while rain falls on the roof and someone walks over gravel far away".split()


def options(description: str, **defaults) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


def machine(device: torch.device) -> str:
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}"


def compare(rounds: int, sides: dict, warm_up: int = 1) -> None:
    """Print the median of each side and how many times as fast as the first it is, in turns."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = {name: [] for name in sides}
    for _ in range(warm_up + rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            wait()
            times[name].append(time.perf_counter() - start)
    medians = [statistics.median(found[warm_up:]) for found in times.values()]
    for name, found in zip(sides, medians, strict=True):
        print(f"  {name:20}{found:10.4f} s{medians[0] / found:8.2f} times", flush=True)


def random_clips(durations_s) -> list[np.ndarray]:
    """Noise: (n,) int16 each."""
    rng = np.random.default_rng(0)
    return [rng.integers(-3000, 3000, int(s * SAMPLE_RATE), dtype=np.int16) for s in durations_s]


def random_captions(count: int) -> list[str]:
    """Of 8 to 20 words, as Clotho's are."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(8, 21))) for _ in range(count)]


def batch_of(clips: list[np.ndarray], tokens: torch.Tensor) -> Batch:
    """A pair of each clip and row of tokens."""
    ids = torch.arange(len(clips))
    return Batch(*to_segments(clips), ids, tokens, ids, ids)

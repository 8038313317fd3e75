"""Batches of 64 clips from the cache against decoding each time; and building the cache.

    python benchmarks/loading.py [--clips 256] [--rounds 5]

The clips are noise of 15 to 30 s in stereo at 44.1 kHz, as 16-bit wav files in a temporary folder.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks.measure import machine, medians, random_captions, seconds
from dualenc.audio import crop, cut
from dualenc.cache import open_cache
from dualenc.data import PairBatches
from dualenc.decoding import decode, to_int16
from dualenc.layouts import Clip, Split
from dualenc.text import train_tokenizer

RATE = 44_100  # Hz
BATCH = 64


def write_clips(folder: Path, count: int) -> Split:
    rng = np.random.default_rng(0)
    clips = []
    for i, caption in enumerate(tqdm(random_captions(count), "writing", leave=False)):
        frames = int(rng.uniform(15, 30) * RATE)
        path = folder / f"{i}.wav"
        soundfile.write(path, rng.integers(-3000, 3000, (frames, 2), dtype=np.int16), RATE)
        clips.append(Clip(path.name, path, (caption,)))
    return Split(str(folder), clips, [], "folder")


def anonymous_mib() -> float:
    """Resident memory less the mapped pages of files, which the system takes back at need."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cpu")
    print(machine(device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split = write_clips(folder, args.clips)
        open_cache(split, folder / "cache", 2)  # the first pays for what is read anew
        built = {}
        for processes in (1, 2):
            built[processes] = seconds(
                lambda n=processes: open_cache(split, folder / f"cache{n}", n), device
            )
        print(
            f"building the cache of {args.clips} clips: {built[1]:.2f} s with 1 process, "
            f"{built[2]:.2f} s with 2: {built[1] / built[2]:.2f} times"
        )
        cache = open_cache(split, folder / "cache1")
        batches = PairBatches([(split, cache)], train_tokenizer(split.captions, 400), BATCH)
        step = iter(range(10**9))

        def from_cache():
            batches[next(step)]

        def decoding():
            paths = [split.clips[i].path for i in np.arange(BATCH) % len(split.clips)]
            segments = [cut(crop(to_int16(decode(path)))) for path in paths]
            torch.from_numpy(np.concatenate(segments))

        times = medians({"cache": from_cache, "decoding": decoding}, args.rounds, device)
        print(
            f"a batch of {BATCH} clips: {1e3 * times['cache']:.1f} ms from the cache, "
            f"{1e3 * times['decoding']:.1f} ms decoded and resampled: "
            f"{times['decoding'] / times['cache']:.1f} times"
        )
        before = anonymous_mib()
        for _ in range(batches.steps_per_epoch):
            from_cache()
        print(f"memory of the process's own grew by {anonymous_mib() - before:.0f} MiB over an "
              f"epoch (the cache holds {cache.samples.nbytes / 2**20:,.0f} MiB)")


if __name__ == "__main__":
    main()

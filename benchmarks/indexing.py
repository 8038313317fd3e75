"""Indexing a folder of sounds, beside decoding alone and embedding alone; a large index on disk.

    python benchmarks/indexing.py [--preset tiny] [--clips 48] [--files 20000] [--saves 100]
                                  [--rounds 3]

The clips are noise of 10 to 30 s, stereo at 44.1 kHz, 16-bit wav. Decoding alone is one file after
another; embedding alone is embed_audio on their waveforms. The large index is of random embeddings,
three segments for each of its files, which are empty.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import compare, machine, options, random_captions, seconds_of, write_noise

from dualenc.decoding import stream_audio, to_int16
from dualenc.model import DualEncoder
from dualenc.search import Content, File, Reading, SoundIndex, StoredIndex, stamp

RATE = 44_100
SEGMENTS = 3  # segments of each file of the large index


def indexing(model: DualEncoder, folder: Path, paths: list[Path]) -> dict[str, Callable]:
    """Return the three sides: decoding alone, embedding alone, both with the index on disk."""
    waveforms = [to_int16(np.concatenate(list(stream_audio(path)))) for path in paths]

    def decode() -> None:
        for path in paths:
            for block in stream_audio(path):
                to_int16(block)

    def index() -> None:
        index_folder = folder / ".index"
        SoundIndex.build(model, folder, index_folder)
        shutil.rmtree(index_folder)

    return {
        "decoding alone": decode,
        "embedding alone": partial(model.embed_audio, waveforms),
        "indexing": index,
    }


def write_large_index(model: DualEncoder, folder: Path, files: int, saves: int) -> None:
    """Write an index of empty files in so many saves, as minutes of embedding would."""
    stored = StoredIndex(folder / ".index", model)
    stored.check_writable()
    for numbers in np.array_split(np.arange(files), saves):
        for number in numbers:
            path = folder / f"recording {number:07}.wav"
            path.touch()
            file = File(*stamp(path.stat()), f"{number:032}")
            segments = torch.randn(SEGMENTS, model.config.embedding)
            segments /= segments.sum(dim=0).norm()
            content = Content(10.0 * SEGMENTS, SEGMENTS, fault="")
            stored.add(Reading(str(path), file, content), segments)
        stored.save()


def size_on_disk(folder: Path) -> str:
    parts = list(folder.rglob("*.part"))
    return f"{sum(part.stat().st_size for part in parts) / 1e6:.1f} MB in {len(parts)} parts"


def main() -> None:
    args = options(__doc__, preset="tiny", clips=48, files=20_000, saves=100, rounds=3)
    print(machine(torch.device("cpu")))
    model = DualEncoder.create(args.preset, "random", random_captions(64)).eval()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths = write_noise(
            folder, args.clips, shortest_s=10, longest_s=30, rate=RATE, channels=2
        )
        seconds = compare(args.rounds, indexing(model, folder, paths))
    larger = max(seconds["decoding alone"], seconds["embedding alone"])
    print(f"  indexing takes {seconds['indexing'] / larger:.2f} times the larger of both, "
          f"{seconds['indexing'] / seconds['embedding alone']:.2f} times embedding alone")

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        written_in = seconds_of(partial(write_large_index, model, folder, args.files, args.saves))
        print(f"an index of {args.files:,} files: {size_on_disk(folder)}, "
              f"written in {written_in:.1f} s")
        index = SoundIndex.build(model, folder, folder / ".index")
        query = torch.nn.functional.normalize(torch.randn(model.config.embedding), dim=0)
        matrix = index.vectors()
        compare(args.rounds, {
            "a matrix times a vector": lambda: matrix @ query,
            "searching": partial(index.nearest, query),
            "opening": partial(SoundIndex.build, model, folder, folder / ".index"),
        })
        merged_in = seconds_of(lambda: StoredIndex(folder / ".index", model).merge())
        print(f"merged: {size_on_disk(folder)}, in {merged_in:.1f} s")


if __name__ == "__main__":
    main()

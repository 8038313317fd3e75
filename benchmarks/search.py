"""Exact search over a million clips, beside faiss.IndexFlatIP in the same run.

    pip install faiss-cpu        # for this benchmark alone
    python benchmarks/search.py [--clips 1000000]

An index of random unit vectors is written, opened, and searched with one query and with 64, in
turns with faiss; both use all cores. It takes 8.2 GB of disk and 8.2 GB of memory for a million
clips. The time of a search is the lowest of several: other programs only ever add to it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from dualenc.index import FILE_RECORD, SoundIndex  # noqa: E402 - found through the line above
from dualenc.model import DualEncoder  # noqa: E402

K = 10
GB = 1e9


def random_units(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    """(n, width) float32, unit norm, made in place."""
    vectors = rng.random((n, width), dtype=np.float32)
    vectors -= 0.5
    for block in np.array_split(vectors, max(1, n // 10_000)):
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return vectors


def write_index(model: DualEncoder, n: int, folder: Path) -> None:
    """An index of n files of 10 s with long names."""
    index = SoundIndex(model, folder)
    index.embeddings = random_units(np.random.default_rng(0), n, model.config.embedding)
    index.segments = index.embeddings
    names = [b"some folder/recording %07d.wav" % i for i in range(n)]
    index.names = np.frombuffer(b"".join(names), np.uint8)
    index.files = np.zeros(n, FILE_RECORD)
    index.files["samples"] = 320_000
    index.files["name_end"] = np.cumsum([len(name) for name in names])
    index.files["segment_end"] = np.arange(1, n + 1)
    index.save(folder)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bandwidth(vectors: torch.Tensor) -> float:
    """Bytes per second that can be read: the best of three ways to go through all of them once."""
    flat = vectors.flatten()
    whole = flat.view(torch.int64)
    some = flat[: 2**26]  # 256 MB
    copy = torch.empty_like(some)
    ways = [
        (flat.nbytes, lambda: flat.sum()),
        (flat.nbytes, lambda: whole.max()),
        (2 * copy.nbytes, lambda: copy.copy_(some)),  # read and written
    ]
    return max(size / min(seconds(way) for _ in range(4)) for size, way in ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="for the index (default: a temporary one)")
    args = parser.parse_args()
    try:
        import faiss
    except ImportError:
        sys.exit("this benchmark compares with faiss: pip install faiss-cpu")
    model = DualEncoder.create("tiny", "random", ["a dog barks"])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_index(model, args.clips, Path(folder))
        opening = min(seconds(lambda: SoundIndex.load(folder, model)) for _ in range(3))
        index = SoundIndex.load(folder, model)
        flat = faiss.IndexFlatIP(model.config.embedding)
        flat.add(index.embeddings)
        report(index, flat, opening, args.rounds)


def report(index: SoundIndex, flat, opening: float, rounds: int) -> None:
    n, width = index.embeddings.shape
    limit = bandwidth(torch.from_numpy(index.embeddings))
    print(f"{n:,} clips x {width}, {torch.get_num_threads()} threads; opened in {opening:.3f} s")
    print(f"memory is read at {limit / GB:.1f} GB/s")
    print(f"{'queries':>7} {'dualenc':>10} {'faiss':>10} {'faiss / dualenc':>16} {'bandwidth':>10}")
    for count in (1, 64):
        queries = random_units(np.random.default_rng(1), count, width)
        found = index.nearest(torch.from_numpy(queries), K)
        scores, _ = flat.search(queries, K)
        np.testing.assert_allclose([[m.score for m in row] for row in found], scores, atol=1e-5)
        times = [
            (seconds(lambda: index.nearest(torch.from_numpy(queries), K)),  # noqa: B023 - at once
             seconds(lambda: flat.search(queries, K)))  # noqa: B023
            for _ in range(rounds)
        ]
        own, theirs = (min(side) for side in zip(*times, strict=True))
        share = index.embeddings.nbytes / own / limit
        print(f"{count:7} {own:8.3f} s {theirs:8.3f} s {theirs / own:16.2f} {share:10.0%}")


if __name__ == "__main__":
    main()

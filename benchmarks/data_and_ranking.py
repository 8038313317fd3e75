"""Batches from the cache, metrics, and search in an index, each beside a plain way.

    python benchmarks/data_and_ranking.py [--clips 256] [--files 200000] [--rounds 5]

The clips are noise of 15 to 30 s, stereo at 44.1 kHz; embeddings are random. The plain ways decode
every time, and sort all candidates.
"""

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import compare, machine, options, random_captions, write_noise

from dualenc.audio import crop, to_segments
from dualenc.data import PairBatches, decode_splits, read_split
from dualenc.decoding import load_audio, to_int16
from dualenc.metrics import MAP_CUTOFFS, RECALL_CUTOFFS, retrieval_metrics
from dualenc.model import DualEncoder
from dualenc.search import Content, SoundIndex

RATE = 44_100
BATCH = 64
TEST_CLIPS = 1045  # clips of Clotho's test split
CAPTIONS_PER_CLIP = 5
EMBEDDING = 1024


def loading(folder: Path, clips: int) -> dict[str, Callable]:
    """Return both ways to load a batch: decoded, and from the cache."""
    paths = write_noise(folder, clips, shortest_s=15, longest_s=30, rate=RATE, channels=2)
    lines = ["file_name,caption"]
    for path, caption in zip(paths, random_captions(clips), strict=True):
        lines.append(f"{path.name},{caption}")
    (folder / "captions.csv").write_text("\n".join(lines))
    split = read_split(str(folder), "all", folder)
    decode_splits([split], folder / "cache")
    tokenizer = DualEncoder.create("tiny", "random", split.captions).tokenizer
    batches = PairBatches([split], tokenizer, BATCH)
    steps = itertools.count()

    def decode() -> None:
        crops = []
        for i in range(BATCH):
            waveform = load_audio(split.clips[i % clips].path)
            crops.append(crop(to_int16(waveform)))
        to_segments(crops)

    def read_from_cache() -> None:
        batches[next(steps)]

    return {"a batch, decoded": decode, "a batch, cached": read_from_cache}


def metrics(clips: int) -> dict[str, Callable]:
    """Return both ways to rank a test split: by sorting all clips, and ours."""
    audio = F.normalize(torch.randn(clips, EMBEDDING), dim=1)
    text = F.normalize(torch.randn(CAPTIONS_PER_CLIP * clips, EMBEDDING), dim=1)
    right_clip = torch.arange(len(text)) // CAPTIONS_PER_CLIP

    def sort_all() -> dict[str, float]:
        order = (text @ audio.T).argsort(dim=1, descending=True, stable=True)
        rank = 1 + (order == right_clip[:, None]).int().argmax(dim=1)
        values = {}
        for k in MAP_CUTOFFS:
            values[f"mAP@{k}"] = ((rank <= k) / rank).mean().item()
        for k in RECALL_CUTOFFS:
            values[f"R@{k}"] = (rank <= k).float().mean().item()
        return values

    ours = partial(retrieval_metrics, text, audio, right_clip[:, None].tolist())
    for name, value in sort_all().items():
        assert abs(ours()[name] - value) < 1e-6
    return {"metrics, sorted": sort_all, "metrics, ours": ours}


def search(files: int) -> dict[str, Callable]:
    """Return both ways to find the ten best of many files of one segment."""
    segments = F.normalize(torch.randn(files, EMBEDDING), dim=1)
    query = F.normalize(torch.randn(EMBEDDING), dim=0)
    contents = {f"recording {i:07}.wav": Content(10.0, 1, "") for i in range(files)}
    index = SoundIndex(None, Path("/sounds"), contents, [segments], torch.arange(files))

    def sort_all() -> list[str]:
        order = (segments @ query).argsort(descending=True)
        return [index.names[i] for i in order[:10].tolist()]

    ours = partial(index.nearest, query, 10)
    assert [match.path.name for match in ours()] == sort_all()
    return {"search, sorted": sort_all, "search, ours": ours}


def main() -> None:
    args = options(__doc__, clips=256, files=200_000, rounds=5)
    print(machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        compare(args.rounds, loading(Path(folder), args.clips))
    compare(args.rounds, metrics(TEST_CLIPS))
    compare(args.rounds, search(args.files))


if __name__ == "__main__":
    main()

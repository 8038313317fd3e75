"""Batches from the cache, metrics, and search in an index, each against its plain side.

    python benchmarks/data_and_ranking.py [--clips 256] [--files 200000] [--rounds 5]

Noise of 15 to 30 s, stereo at 44.1 kHz, 16-bit wav; random embeddings. The plain sides decode each
time, and sort all candidates.
"""

import tempfile
import wave
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import compare, machine, options, random_captions

from dualenc.audio import crop, to_segments
from dualenc.data import PairBatches, decode_splits, read_split
from dualenc.decoding import load_audio, to_int16
from dualenc.metrics import retrieval_metrics
from dualenc.model import DualEncoder
from dualenc.search import Sound, SoundIndex

RATE, BATCH, TEST_CLIPS = 44_100, 64, 1045  # of Clotho's test split


def loading(folder: Path, clips: int) -> dict:
    rng, lines = np.random.default_rng(0), ["file_name,caption"]
    for i, caption in enumerate(random_captions(clips)):
        samples = rng.integers(-3000, 3000, (int(rng.uniform(15, 30) * RATE), 2), dtype=np.int16)
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setparams((2, 2, RATE, 0, "NONE", ""))
            file.writeframes(samples.tobytes())
        lines.append(f"{i}.wav,{caption}")
    (folder / "captions.csv").write_text("\n".join(lines))
    split = read_split(str(folder), "all", folder)
    decode_splits([split], folder / "cache")
    tokenizer = DualEncoder.create("tiny", "random", split.captions).tokenizer
    batches, step = PairBatches([split], tokenizer, BATCH), count()

    def decoding():
        waveforms = (load_audio(split.clips[i % clips].path) for i in range(BATCH))
        to_segments([crop(to_int16(waveform)) for waveform in waveforms])

    return {"a batch, decoded": decoding, "a batch, cached": lambda: batches[next(step)]}


def metrics(clips: int) -> dict:
    audio, text = (F.normalize(torch.randn(n, 1024), dim=1) for n in (clips, 5 * clips))
    own = torch.arange(len(text)) // 5

    def plain():
        order = (text @ audio.T).argsort(dim=1, descending=True, stable=True)
        rank = 1 + (order == own[:, None]).int().argmax(dim=1)
        found = {f"mAP@{k}": ((rank <= k) / rank).mean().item() for k in (10, 16)}
        return found | {f"R@{k}": (rank <= k).float().mean().item() for k in (1, 5, 10)}

    ours = partial(retrieval_metrics, text, audio, own[:, None].tolist())
    assert all(abs(ours()[name] - value) < 1e-6 for name, value in plain().items())
    return {"metrics, sorted": plain, "metrics, ours": ours}


def search(files: int) -> dict:
    shares, query = F.normalize(torch.randn(files, 1024), dim=1), torch.randn(1024)
    sounds = {f"recording {i:07}.wav": Sound(10.0, 1, "") for i in range(files)}
    index = SoundIndex(None, Path("/sounds"), sounds, [shares], torch.arange(files))

    def plain():
        return [index.names[i] for i in (shares @ query).argsort(descending=True)[:10]]

    assert [match.path.name for match in index.nearest(query, 10)] == plain()
    return {"search, sorted": plain, "search, ours": partial(index.nearest, query, 10)}


if __name__ == "__main__":
    args = options(__doc__, clips=256, files=200_000, rounds=5)
    print(machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        compare(args.rounds, loading(Path(folder), args.clips))
    compare(args.rounds, metrics(TEST_CLIPS))
    compare(args.rounds, search(args.files))

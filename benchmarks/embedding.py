"""Embedding for evaluation: 12 clips of 15 to 30 s with 5 captions each, ours against plain.

    python benchmarks/embedding.py [--clips 12] [--rounds 2] [--device auto]

The plain recipe (benchmarks/plain.py) encodes a clip once per caption. Report-size model, random
weights, noise.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks.measure import machine, matrix_rate, medians, random_captions, random_clips
from benchmarks.plain import PlainRecipe
from dualenc.audio import cut
from dualenc.model import DualEncoder
from dualenc.processes import Processes
from dualenc.stages import choose_precision

PATCHES, WIDTH = 2 + 8 * 62, 768
SEGMENT_FLOP = 12 * (24 * PATCHES * WIDTH**2 + 4 * PATCHES**2 * WIDTH) + 2 * 496 * 256 * WIDTH
CAPTIONS_PER_CLIP = 5
PLAIN_BATCH = 12  # pairs


def embed_plain(plain, clips, captions, device, precision=torch.float32):
    """By the plain recipe: every caption brings its clip along."""
    audio, text = [], []
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        for start in range(0, len(captions), PLAIN_BATCH):
            words = captions[start : start + PLAIN_BATCH]
            rows = range(start, start + len(words))
            audio.append(plain.encode_audio([clips[i // CAPTIONS_PER_CLIP] for i in rows]))
            text.append(plain.encode_text(words))
    return torch.cat(audio)[::CAPTIONS_PER_CLIP].cpu(), torch.cat(text).cpu()


@torch.inference_mode()
def compare(ours, plain, clips, captions, device, rounds):
    equal = torch.float16 if device.type == "cuda" else torch.float32

    def theirs(precision=equal):
        return embed_plain(plain, clips, captions, device, precision)

    def mine(precision, of_text=True):
        ours.precision = precision
        return ours.embed_audio(clips), ours.embed_text(captions if of_text else [])

    both = zip(mine(None), theirs(torch.float32), strict=True)
    worst = max((a - b).abs().max().item() for a, b in both)
    print(f"agreement: embeddings within {worst:.1e}", flush=True)
    assert worst < 1e-4
    precisions = {
        "equal precision": torch.float16 if device.type == "cuda" else None,
        "our defaults": choose_precision("auto", device),
    }
    sides = {"plain": theirs}
    for label, precision in precisions.items():
        sides[label] = functools.partial(mine, precision)
        sides[f"{label}, audio"] = functools.partial(mine, precision, of_text=False)
        mine(precision)  # warm; the plain side is warm from the check, which takes minutes on a CPU
    times = medians(sides, rounds, device, warm_up=int(device.type == "cuda"))
    segments = sum(len(cut(clip)) for clip in clips)
    for label, precision in precisions.items():
        kind = precision or torch.float32
        rate = segments * SEGMENT_FLOP / times[f"{label}, audio"]
        print(
            f"{label:16} ({str(kind)[6:]:8}) plain {times['plain']:7.3f} s, ours "
            f"{times[label]:7.3f} s: {times['plain'] / times[label]:.2f} times; audio tower "
            f"{rate / 1e9:,.0f} GFLOP/s, {100 * rate / matrix_rate(device, kind):.0f} % of the "
            "matrix rate", flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = Processes.start(args.device).device
    torch.manual_seed(0)
    ours = DualEncoder.create("report", "random", random_captions(500)).to(device).eval()
    clips = random_clips(torch.linspace(15, 30, args.clips).tolist())
    print(machine(device))
    captions = random_captions(CAPTIONS_PER_CLIP * args.clips)
    compare(ours, PlainRecipe(ours).eval(), clips, captions, device, args.rounds)


if __name__ == "__main__":
    main()

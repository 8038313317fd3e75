"""A training step of the report-size model: ours against the plain recipe (benchmarks/plain.py).

    python benchmarks/training_step.py [--pairs 16] [--rounds 3] [--device auto]

Forward, backward and optimiser step, on noise, with random weights. Half of the clips last 10 s,
half 15 to 30 s; then all of them 10 s. Equal precision is fp32 on a CPU and fp16 on a GPU, where
the plain recipe is compiled, too; then ours with its defaults.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks.measure import (
    batch_of,
    machine,
    matrix_rate,
    medians,
    random_captions,
    random_clips,
)
from benchmarks.plain import PlainRecipe
from dualenc.config import PRESETS
from dualenc.losses import contrastive_loss
from dualenc.model import DualEncoder
from dualenc.processes import Processes
from dualenc.text import tokenize
from dualenc.training import choose_precision

TAU = PRESETS["report"].tau


def loss_of(audio, text):
    return contrastive_loss(audio, text, torch.arange(len(audio), device=audio.device), TAU)


def flop(segments: int, captions: int, tokens: int) -> float:
    """Of a training step's matrix products: three times those of the forward pass."""
    patches, width = 2 + 6 * 47, 768  # with patchout
    audio = 12 * (24 * patches * width**2 + 4 * patches**2 * width) + 2 * 496 * 256 * width
    text = 24 * (24 * tokens * 1024**2 + 4 * tokens**2 * 1024)
    return 3 * (segments * audio + captions * text)


class Side:
    """A model, its optimiser, and a step."""

    def __init__(self, model, forward, optimizer, precision):
        self.model, self.forward, self.optimizer = model, forward, optimizer
        self.precision = precision
        device = optimizer.param_groups[0]["params"][0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    def step(self):
        self.model.train()
        self.model.precision = self.precision  # ours; the plain recipe has an autocast of its own
        audio, text = self.forward()
        self.scaler.scale(loss_of(audio, text)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def compare(durations, ours, plain, device, rounds):
    clips = random_clips(durations)
    captions = random_captions(len(clips))
    batch = batch_of(clips, tokenize(ours.tokenizer, captions)).to(device)

    def forward_ours():
        return ours.encode_audio(batch.segments, batch.counts), ours.encode_text(batch.tokens)

    def forward_plain():
        with torch.autocast(device.type, torch.float16, enabled=equal is not None):
            return plain.encode_audio(clips), plain.encode_text(captions)

    equal = None
    check(forward_ours, forward_plain, ours, plain)
    equal = torch.float16 if device.type == "cuda" else None
    precisions = {"equal precision": equal, "our defaults": choose_precision("auto", device)}
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-6, fused=True)  # of all sides
    sides = {"plain": Side(plain, forward_plain, optimizer, equal)}
    sides |= {n: Side(ours, forward_ours, optimizer, p) for n, p in precisions.items()}
    times = medians({name: side.step for name, side in sides.items()}, rounds, device)
    for label, precision in precisions.items():
        rate = flop(len(batch.segments), *batch.tokens.shape) / times[label]
        kind = precision or torch.float32
        share = rate / matrix_rate(device, kind)
        print(
            f"  {label:16} ({str(kind)[6:]:8}) plain {times['plain']:7.3f} s, ours "
            f"{times[label]:7.3f} s: {times['plain'] / times[label]:.2f} times; "
            f"{rate / 1e9:,.0f} GFLOP/s, {100 * share:.0f} % of the matrix rate", flush=True,
        )
    ours.precision = None


@torch.no_grad()
def check(forward_ours, forward_plain, ours, plain):
    """Both sides in fp32, without dropout, patchout and jitter."""
    ours.eval()
    plain.eval()
    mine, theirs = forward_ours(), forward_plain()
    worst = max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True))
    difference = abs(loss_of(*mine) / loss_of(*theirs) - 1).item()
    print(f"  agreement: embeddings within {worst:.1e}, losses within {difference:.1e} relative")
    assert worst < 1e-4 and difference < 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = Processes.start(args.device).device
    torch.manual_seed(0)
    ours = DualEncoder.create("report", "random", random_captions(500)).to(device)
    plain = PlainRecipe(ours)
    if device.type == "cuda":
        plain.passt, plain.roberta = torch.compile(plain.passt), torch.compile(plain.roberta)
    print(machine(device))
    half = args.pairs // 2
    mixed = [10.0] * half + torch.linspace(15, 30, args.pairs - half).tolist()
    for label, durations in {"10 s and 15 to 30 s": mixed, "all 10 s": [10.0] * args.pairs}.items():
        print(f"{args.pairs} pairs, {label}")
        compare(durations, ours, plain, device, args.rounds)


if __name__ == "__main__":
    main()

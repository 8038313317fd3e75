"""A step of stage 2 with four teachers against a step of stage 1.

    python benchmarks/distillation.py [--pairs 16] [--rounds 5] [--device auto]

Report-size model with random weights, 10 s clips of noise. The teachers' embeddings are computed
before training (benchmarks/embedding.py says what that costs), so that a step only looks them up.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[1])]

import distill
import train
from benchmarks.measure import batch_of, machine, medians, random_captions, random_clips
from dualenc.model import DualEncoder
from dualenc.processes import Processes
from dualenc.stages import choose_precision
from dualenc.step import step_gradients
from dualenc.text import tokenize

TEACHERS = 4
CLIPS, CAPTIONS = 3839, 19_195  # of Clotho's development split


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    processes = Processes.start(args.device)
    device = processes.device
    torch.manual_seed(0)
    captions = random_captions(args.pairs)
    model = DualEncoder.create("report", "random", captions).to(device).train()
    model.precision = choose_precision("auto", device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    tokens = tokenize(model.tokenizer, captions)
    batch = batch_of(random_clips([10.0] * args.pairs), tokens)
    teachers = [
        tuple(F.normalize(torch.randn(n, 1024), dim=1).to(device) for n in (CLIPS, CAPTIONS))
        for _ in range(TEACHERS)
    ]

    def step(loss_of):
        optimizer.zero_grad(set_to_none=True)
        step_gradients(model, batch, loss_of, processes, (0, 0))
        optimizer.step()

    distilled = distill.distillation(teachers, (1.0, 1.0))
    sides = {"stage 1": lambda: step(train.loss_of), "stage 2": lambda: step(distilled)}
    times = medians(sides, args.rounds, device)
    print(machine(device))
    print(
        f"{args.pairs} pairs: stage 1 {times['stage 1']:.3f} s, stage 2 with {TEACHERS} teachers "
        f"{times['stage 2']:.3f} s: {100 * (times['stage 2'] / times['stage 1'] - 1):+.1f} %"
    )


if __name__ == "__main__":
    main()

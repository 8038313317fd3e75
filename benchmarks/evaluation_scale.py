"""Metrics for 1,045 to 20,000 clips with 5 queries each: time and memory on random embeddings.

    python benchmarks/evaluation_scale.py [--clips 1045 5000 20000]
"""

import argparse
import resource
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks.measure import machine, medians
from dualenc.metrics import retrieval_metrics

WIDTH = 1024
QUERIES_PER_CLIP = 5


def unit_rows(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, WIDTH), normalised in place: a copy would hide as much memory of the metrics'."""
    rows = torch.randn(count, WIDTH, generator=generator)
    return rows.div_(rows.norm(dim=1, keepdim=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, nargs="+", default=[1045, 5000, 20_000])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = torch.device("cpu")
    print(machine(device))
    for clips in args.clips:
        generator = torch.Generator().manual_seed(0)
        audio = unit_rows(clips, generator)
        queries = QUERIES_PER_CLIP * clips
        text = unit_rows(queries, generator)
        relevant = [[i // QUERIES_PER_CLIP] for i in range(queries)]
        held = (text.nbytes + audio.nbytes) / 2**20
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        once = medians(
            {"ours": lambda t=text, a=audio, r=relevant: retrieval_metrics(t, a, r)},
            args.rounds, device,
        )["ours"]
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{clips:7,} clips, {queries:8,} queries: {once:8.3f} s, "
            f"{1e9 * once / queries / clips:.2f} ns per pair; embeddings {held:,.0f} MiB, "
            f"{max(0.0, after - before):,.0f} MiB more at the peak (all similarities would be "
            f"{4 * queries * clips / 2**20:,.0f} MiB)", flush=True,
        )


if __name__ == "__main__":
    main()

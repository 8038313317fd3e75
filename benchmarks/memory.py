"""Peak memory and time of one training step, whole and in micro-batches.

    python benchmarks/memory.py                                  # a GPU if there is one
    python benchmarks/memory.py --batch-size 16 --micro-batch 16 4 --device cpu

The model has the report's size and random weights; half of the clips last 10 s, as AudioCaps' do,
the others 15 to 30 s, as Clotho's; captions have 20 tokens. Each step is taken in a process of its
own, with AdamW's state in place. Memory is the most that PyTorch allocated on a GPU, and the peak
resident memory of the process on a CPU. Time is the clock's on a GPU, and the processor's, summed
over its cores, on a CPU, where other programs would disturb the clock's.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks.measure import batch_of, machine, random_clips
from dualenc.model import DualEncoder
from dualenc.processes import Processes
from dualenc.stages import choose_precision
from dualenc.step import step_gradients
from train import loss_of

CAPTION_TOKENS = 20
GB = 1e9


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[64, 16, 8, 4])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def random_batch(size: int):
    """Noise, every second clip of 10 s, and random tokens."""
    rng = np.random.default_rng(0)
    durations = np.where(np.arange(size) % 2, 10, rng.uniform(15, 30, size))
    tokens = torch.from_numpy(rng.integers(5, 50_000, (size, CAPTION_TOKENS)))
    return batch_of(random_clips(durations), tokens)


def measure(size: int, micro_batch: int, device: str, precision: str) -> dict:
    """One training step; prints what it took as JSON."""
    processes = Processes.start(device)
    on_gpu = processes.device.type == "cuda"
    torch.manual_seed(0)
    model = DualEncoder.create("report", "random", ["a caption"]).to(processes.device).train()
    model.precision = choose_precision(precision, processes.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for parameter in model.parameters():  # a step that changes nothing makes AdamW's state
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    batch = random_batch(size)

    clock = time.perf_counter if on_gpu else time.process_time
    for step in range(1 + on_gpu):  # a GPU's first step also chooses kernels
        start = clock()
        losses = step_gradients(model, batch, loss_of, processes, (0, step), micro_batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].item()  # waits for the GPU
        if on_gpu:
            torch.cuda.synchronize()
        seconds = clock() - start
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "seconds": seconds, "segments": len(batch.segments)}


def main() -> None:
    args = parse_arguments()
    if args.measure:
        found = measure(args.batch_size, args.micro_batch[0], args.device, args.precision)
        print(json.dumps(found))
        return
    device = Processes.start(args.device).device
    precision = choose_precision(args.precision, device)
    name = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[precision]
    print(f"{machine(device)}; towers in {name}")
    print(f"{'batch':>6}{'micro-batch':>13}{'segments':>10}{'peak GB':>9}{'seconds':>9}")
    for micro_batch in args.micro_batch:
        command = [
            sys.executable, __file__, "--measure", "--batch-size", str(args.batch_size),
            "--micro-batch", str(micro_batch), "--device", device.type, "--precision", name,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        row = f"{args.batch_size:6}{micro_batch:13}"
        if done.returncode:  # out of memory: the next, smaller piece may fit
            print(f"{row}   does not fit ({(done.stderr.splitlines() or ['killed'])[-1][:60]})")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        cells = f"{found['segments']:10}{found['peak'] / GB:9.2f}{found['seconds']:9.1f}"
        print(row + cells, flush=True)


if __name__ == "__main__":
    main()

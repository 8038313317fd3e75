"""A run that is killed anywhere and started again ends as one that was left alone, bit for bit.

Processes are forked from a server that has imported everything, so that a start takes no seconds.
`python tests/kill_longer.py` does the same for longer, and for distillation.
"""

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from dualenc import run, training

KILLS = 20
CHECKPOINTS = (".last.pt.*", ".*.pt.*")  # while they are written
WRITES = (*CHECKPOINTS, ".*.int16.*", ".*.tmp")
OPTIONS = [
    "--datasets", "../sounds", "--batch-size", "4", "--captions-per-clip", "2", "--epochs", "3",
    "--checkpoint-every", "1", "--log-every", "2", "--workers", "1", "--learn-tau",
    "--device", "cpu", "--precision", "fp32", "--cache-dir", "cache", "--out", "runs/run",
]

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["train", "distill"])


def write_sounds(folder: Path) -> None:
    """Seven short sounds with two captions each: nine steps in all."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "captions.csv", "w") as file:
        file.write("file_name,caption_1,caption_2\n")
        for i in range(7):
            soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(4000), 8000)
            file.write(f"{i}.wav,sound number {i},noise the {i}th\n")


def command(script: str, arguments: list[str], folder: Path) -> None:
    """What the child process does: the command, in its folder, quietly."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for its workers, as in a new process
    training.write_curves = lambda runs, out: None  # most of the time, and nothing is resumed of it
    sys.argv = [f"{script}.py", *OPTIONS, *arguments]
    run(__import__(script).main)


def start(*arguments):
    process = processes.Process(target=command, args=arguments)
    process.start()
    return process


def undisturbed(script: str, arguments: list[str], folder: Path) -> float:
    """The run that is left alone; returns its seconds."""
    warm = processes.Process()  # the server's own start, once, is not counted
    warm.start()
    warm.join()
    began = time.monotonic()
    process = start(script, arguments, folder)
    process.join()
    assert process.exitcode == 0, (folder / "output.txt").read_text()
    return time.monotonic() - began


def wait_for_write(process, folder: Path, rng: random.Random) -> None:
    """Wait until a file is being written: one of the first few, of what is still to come."""
    pattern = rng.choice(WRITES if not (folder / "runs/run/last.pt").exists() else CHECKPOINTS)
    skip, before = rng.choice((0, 1, 2)), False
    while process.is_alive() and skip >= 0:
        now = any(folder.rglob(pattern))
        skip -= now and not before
        before = now
        time.sleep(0.0005)


def kill_again_and_again(
    script: str, arguments: list[str], folder: Path, kills: int, rng: random.Random
) -> tuple[int, int, list[str]]:
    """Run to the end as often as it takes for so many kills, half of them within a write.

    Returns:
        kills within the write of a checkpoint, runs, and what differed from the run that was left
        alone.
    """
    seconds = undisturbed(script, arguments, folder / "whole")
    within, runs, differing = 0, 0, []
    while kills > 0:
        runs += 1
        here = folder / f"parts{runs}"
        while True:
            process = start(script, arguments, here)
            if kills > 0 and rng.random() < 0.5:
                process.join(rng.uniform(0, 0.7 * seconds))
            elif kills > 0:
                wait_for_write(process, here, rng)
            else:
                process.join()
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -9, (here / "output.txt").read_text()
            kills -= 1
            within += any(here.rglob(f".*.pt.*.{process.pid}.tmp"))
        differing += [f"{here.name}: {what}" for what in differences(folder / "whole", here)]
    return within, runs, differing


def differences(whole: Path, parts: Path) -> list[str]:
    found = []
    for name in ("best.pt", "last.pt"):
        paths = (folder / "runs/run" / name for folder in (whole, parts))
        ours, theirs = (torch.load(path, weights_only=True) for path in paths)
        found += [name] if not equal(ours, theirs) else []
    logs = [(folder / "runs/run/log.jsonl").read_bytes() for folder in (whole, parts)]
    found += ["log"] if logs[0] != logs[1] else []
    return found + [f"left {path.name}" for path in parts.rglob(".*.tmp")]


def equal(a, b) -> bool:
    """Equal to the last bit: dictionaries, lists, tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_killed_at_twenty_moments(tmp_path):
    write_sounds(tmp_path / "sounds")
    within, runs, differing = kill_again_and_again(
        "train", ["--preset", "tiny"], tmp_path, KILLS, random.Random(0)
    )
    assert not differing and within >= 3 and runs >= 1

"""The program that test_processes.py runs in two processes: commands of train.py and distill.py.

    torchrun --nproc-per-node 2 tests/two_processes.py COMMANDS.json

COMMANDS.json holds a list of commands, each the name of a script and its arguments. Process r
writes draws-r.json beside it: a random number of each training step.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import distill  # noqa: E402
import train  # noqa: E402
from dualenc import DualEncoder, training  # noqa: E402
from dualenc.errors import InputError  # noqa: E402

SCRIPTS = {"train": train, "distill": distill}


def make_comparable(set_attribute: Callable) -> None:
    """Have two processes take the steps of one.

    Dropout, patchout and jitter are off, since processes draw differently; and Adam, with a larger
    epsilon, does not make a whole step of a gradient that is rounding. Learning curves, which take
    longer than the steps, are not drawn.
    """
    set_attribute(train, "write_curves", lambda folders, path: None)
    set_attribute(DualEncoder, "train", lambda self, mode=True: nn.Module.train(self, False))
    set_attribute(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-5))


def note_draws() -> list[float]:
    """Return a list that receives, at every step, a number that dropout might draw."""
    draws = []
    encode_pairs = DualEncoder.encode_pairs

    def drawing(self, *arguments):
        with torch.random.fork_rng(devices=[]):
            draws.append(torch.rand(1).item())
        return encode_pairs(self, *arguments)

    DualEncoder.encode_pairs = drawing
    return draws


def join_once() -> None:
    """Let several commands share one group of processes, which cannot be joined again."""
    join = training.dist.init_process_group

    def join_if_alone(*arguments, **options):
        if not training.dist.is_initialized():
            join(*arguments, **options)

    training.dist.init_process_group = join_if_alone


def main() -> None:
    torch.set_num_threads(1)
    make_comparable(setattr)
    draws = note_draws()
    join_once()
    commands = Path(sys.argv[1])
    for script, *arguments in json.loads(commands.read_text()):
        sys.argv[1:] = arguments
        try:
            SCRIPTS[script].main()
        except InputError as error:
            print("refused:", error, flush=True)
        # The first process writes what the next command reads.
        training.dist.barrier()
    commands.with_name(f"draws-{training.RANK}.json").write_text(json.dumps(draws))


if __name__ == "__main__":
    main()

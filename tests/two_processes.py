"""The program that test_processes.py runs in two processes: commands of train.py and distill.py.

    torchrun --nproc-per-node 2 tests/two_processes.py COMMANDS.json

COMMANDS.json holds a list of commands, each the name of a script and its arguments. Process r
writes draws-r.json beside it: a random number of each training step.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from conftest import make_comparable, note_draws  # noqa: E402

import distill  # noqa: E402
import train  # noqa: E402
from dualenc import training  # noqa: E402
from dualenc.errors import InputError  # noqa: E402

SCRIPTS = {"train": train, "distill": distill}


def draw_no_curves(set_attribute: Callable) -> None:
    """Leave out the learning curves, which take longer than the steps."""
    set_attribute(train, "write_curves", lambda folders, path: None)


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
    draw_no_curves(setattr)
    draws = note_draws(setattr)
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

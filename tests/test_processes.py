"""Two processes make the weights of one: torchrun on the CPU, dropout, patchout and jitter off."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_folder
from torch import nn

import distill
import train
from dualenc import DualEncoder

ROOT = Path(__file__).parents[1]
# The models stay in eval mode, and AdamW does not make a whole step of a gradient that is rounding.
SCRIPT = """
import functools, json, sys
sys.path[:0] = [{root!r}]
import torch
from torch import nn
import distill, train
from dualenc import DualEncoder, training
from dualenc.errors import InputError

torch.set_num_threads(1)
init = training.dist.init_process_group
training.dist.init_process_group = lambda *a, **k: training.dist.is_initialized() or init(*a, **k)
DualEncoder.train = lambda self, mode=True: nn.Module.train(self, False)
torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=1e-5)
for script, *arguments in json.load(open(sys.argv[1])):
    sys.argv[1:] = arguments
    try:
        {{"train": train, "distill": distill}}[script].main()
    except InputError as error:
        print("refused:", error, flush=True)
    training.dist.barrier()  # the first process writes what the next command reads
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same commands by one process and by two; torchrun starts once, since a start costs."""
    folder = tmp_path_factory.mktemp("processes")
    sounds = str(write_folder(folder / "sounds", clips=16))

    def commands(out: Path) -> list[list[str]]:
        common = ["--datasets", sounds, "--cache-dir", str(folder / "cache"), "--batch-size", "4",
                  "--epochs", "1", "--workers", "0", "--device", "cpu"]
        tiny = ["train", *common, "--preset", "tiny", "--out"]
        return [
            [*tiny, str(out / "plain")],
            [*tiny, str(out / "pieces"), "--micro-batch", "1"],
            [*tiny, str(out / "captions"), "--captions-per-clip", "2"],
            ["distill", *common, "--out", str(out / "student"), "--teachers", str(out / "plain"),
             str(out / "captions")],
            [*tiny, str(out / "odd"), "--batch-size", "5"],
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DualEncoder, "train", lambda self, mode=True: nn.Module.train(self, False))
        patch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-5))
        for script, *arguments in commands(folder / "one")[:-1]:
            patch.setattr(sys, "argv", [script, *arguments])
            {"train": train, "distill": distill}[script].main()
    (folder / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    (folder / "commands.json").write_text(json.dumps(commands(folder / "two")))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         folder / "script.py", folder / "commands.json"],
        capture_output=True, text=True, timeout=170,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout


@pytest.mark.parametrize("name", ["plain", "pieces", "captions", "student"])
def test_two_processes_make_the_weights_of_one(runs, name):
    paths = [runs[0] / number / name / "last.pt" for number in ("one", "two")]
    one, two = (DualEncoder.load(path).state_dict() for path in paths)
    start = DualEncoder.load(runs[0] / "one" / "pieces" / "last.pt").state_dict()
    worst = max((one[n] - two[n]).abs().max().item() for n in one if one[n].is_floating_point())
    assert worst < 1e-6
    if name == "student":  # a run that stood still would be equal, too
        assert max((one[n] - start[n]).abs().max().item() for n in one) > 1e-5


def test_the_first_process_speaks_and_writes_for_all(runs):
    folder, out = runs
    logs = [(folder / n / "plain" / "log.jsonl").read_text().splitlines() for n in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) and out.count("in each of 2 processes") == 4
    one, two = (json.loads(lines[-1]) for lines in logs)
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert out.count("refused: --batch-size 5") == 2  # by each; errors.run prints the first one's

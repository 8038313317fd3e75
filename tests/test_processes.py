"""Two processes make the weights of one: torchrun on the CPU, without dropout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_comparable, write_folder
from two_processes import SCRIPTS, draw_no_curves

from dualenc import DualEncoder

PROGRAM = Path(__file__).with_name("two_processes.py")


def commands(folder: Path, out: Path) -> list[list[str]]:
    """Return four runs and one that is refused: two processes cannot share five pairs."""
    common = [
        "--datasets", f"{folder}/sounds", "--cache-dir", f"{folder}/cache", "--batch-size", "4",
        "--epochs", "1", "--workers", "0", "--device", "cpu", "--log-every", "1",
    ]
    tiny = ["train", *common, "--preset", "tiny"]
    teachers = ["--teachers", f"{out}/plain", f"{out}/captions"]
    return [
        [*tiny, "--out", f"{out}/plain"],
        [*tiny, "--out", f"{out}/pieces", "--micro-batch", "1"],
        [*tiny, "--out", f"{out}/captions", "--captions-per-clip", "2"],
        ["distill", *common, "--out", f"{out}/student", *teachers],
        [*tiny, "--out", f"{out}/odd", "--batch-size", "5"],
    ]


class Runs:
    """The runs of the same commands by one process, in folder/one, and by two, in folder/two."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_folder(folder / "sounds", clips=16)
        self._run_in_one_process()
        self._run_in_two_processes()

    def _run_in_one_process(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            make_comparable(patch.setattr)
            draw_no_curves(patch.setattr)
            for script, *arguments in commands(self.folder, self.folder / "one")[:-1]:
                patch.setattr(sys, "argv", [script, *arguments])
                SCRIPTS[script].main()

    def _run_in_two_processes(self) -> None:
        """Run all commands by one call of torchrun: its start takes longer than all of them."""
        path = self.folder / "commands.json"
        path.write_text(json.dumps(commands(self.folder, self.folder / "two")))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        result = subprocess.run(
            [*torchrun, "--nproc-per-node", "2", PROGRAM, path],
            capture_output=True, text=True, timeout=300,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        self.printed = result.stdout

    def weights(self, processes: str, name: str) -> dict:
        return DualEncoder.load(self.folder / processes / name / "last.pt").state_dict()

    def log(self, processes: str, name: str) -> list[dict]:
        text = (self.folder / processes / name / "log.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("processes"))


def largest_difference(a: dict, b: dict) -> float:
    differences = [
        (a[name] - b[name]).abs().max().item() for name in a if a[name].is_floating_point()
    ]
    return max(differences)


@pytest.mark.parametrize("name", ["plain", "pieces", "captions", "student"])
def test_two_processes_make_the_weights_of_one(runs, name):
    difference = largest_difference(runs.weights("one", name), runs.weights("two", name))
    # Rounding makes 1e-6 where the number of threads differs, too. The smallest real fault, a
    # gradient that is not summed over processes, makes 6e-4.
    assert difference < 1e-5


def test_the_student_has_learned(runs):
    # A student that stood still would be equal in both, too.
    start = runs.weights("one", "plain")
    assert largest_difference(runs.weights("one", "student"), start) > 1e-4


def test_each_process_draws_dropout_of_its_own(runs):
    draws = []
    for rank in (0, 1):
        draws += json.loads((runs.folder / f"draws-{rank}.json").read_text())
    # The four runs have one seed and so the same draws.
    runs_made = 4
    steps = 4
    processes = 2
    assert len(draws) == runs_made * steps * processes
    assert len(set(draws)) == steps * processes


def test_the_log_is_that_of_one_process(runs):
    one = runs.log("one", "plain")
    two = runs.log("two", "plain")
    assert len(one) == len(two)
    for line_of_one, line_of_two in zip(one[1:], two[1:], strict=True):
        assert line_of_one["loss"] == pytest.approx(line_of_two["loss"], abs=1e-5)


def test_the_first_process_speaks_for_all(runs):
    assert runs.printed.count("cpu in each of 2 processes") == 5
    assert runs.printed.count("Done after step 4") == 4


def test_each_process_refuses_a_batch_that_two_cannot_share(runs):
    assert runs.printed.count("refused: --batch-size 5") == 2

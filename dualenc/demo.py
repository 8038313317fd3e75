"""The whole system on miniature data: data, teachers, students, one table as the report's Table 1.

    python -m dualenc.demo [--seeds 0 1 2 3 4]

It runs the commands that a user would type, two at a time, each on half of the cores, and prints
them. What a command itself prints goes to a file beside its run.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from dualenc import InputError, run
from dualenc.options import Parser, number

DATA = Path("data/miniature")
RUNS = Path("runs/demo")
AT_ONCE = 2
POLL_S = 0.5
FAILURE_LINES = 20  # of a command's output, where it fails
EPOCHS = 8
TRAINING = f"--captions-per-clip 2 --epochs {EPOCHS} --decay-epochs {EPOCHS - 1}"
STUDENT = f"{TRAINING} --max-lr 5e-4"
# The rows of Table 1: (what was trained on, how) -> (data sets, run of each).
DATASETS = {"Clotho": "clotho", "Clotho + AudioCaps": "clotho audiocaps"}
COLUMNS = {  # of the table -> (row of an evaluation, metric)
    "mAP@16 (new)": ("text to audio, new annotations", "mAP@16"),
    "mAP@10 (new)": ("text to audio, new annotations", "mAP@10"),
    **{name: ("text to audio", name) for name in ("mAP@10", "R@1", "R@5", "R@10")},
}


def name_of(datasets: str, kind: str, seed: int) -> str:
    return f"{datasets.replace(' ', '-')}-{kind}{seed}"


def commands(seed: int) -> list[dict[str, str]]:
    """The three acts: {run's name: command line}; those of one act may run side by side.

    A student's teachers have its seed and the next: with several seeds in a row they are shared.
    """
    data = f"--data-dir {DATA}"
    train, distill, evaluate = {}, {}, {}
    for datasets in DATASETS.values():
        teachers = [name_of(datasets, "teacher", s) for s in (seed, seed + 1)]
        for i, teacher in enumerate(teachers):
            train[teacher] = (
                f"train.py --datasets {datasets} --preset tiny {data} {TRAINING} "
                f"--seed {seed + i} --out {RUNS / teacher}"
            )
        student = name_of(datasets, "student", seed)
        paths = " ".join(str(RUNS / teacher / "best.pt") for teacher in teachers)
        distill[student] = (
            f"distill.py --teachers {paths} {data} {STUDENT} --seed {seed} --out {RUNS / student}"
        )
        for name in (teachers[0], student):
            evaluate[f"{name}-results"] = (
                f"evaluate.py --split test --checkpoint {RUNS / name}/best.pt {data} "
                f"--json {RUNS / name}.json"
            )
    return [train, distill, evaluate]


def run_all(jobs: dict[str, str]) -> None:
    """Run commands, AT_ONCE of them at a time, showing each run's validation as it comes.

    Where one fails, or this is ended, those that still run are ended, too: they save their state.
    """
    waiting, running = list(jobs), {}
    for command in jobs.values():
        print(f"$ python {command}", flush=True)
    try:
        with tqdm(total=len(jobs), unit="run", leave=False) as bar:
            while waiting or running:
                while waiting and len(running) < AT_ONCE:
                    name = waiting.pop(0)
                    running[name] = _start(name, jobs[name])
                time.sleep(POLL_S)
                for name, process in list(running.items()):
                    epochs = _epochs(name)
                    if process.poll() is None:
                        bar.set_postfix_str(f"{name}: {epochs[-1]}" if epochs else name)
                        continue
                    del running[name]
                    if process.returncode:
                        output = (RUNS / f"{name}.txt").read_text(errors="replace")
                        lines = output.splitlines()[-FAILURE_LINES:]
                        raise InputError(f"python {jobs[name]} failed:", *lines)
                    bar.update()
                    bar.write(f"  {name}: {epochs[-1]}" if epochs else f"  {name}: done")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _start(name: str, command: str) -> subprocess.Popen:
    threads = str(max(1, (os.cpu_count() or 1) // AT_ONCE))
    with open(RUNS / f"{name}.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, *command.split()], env=os.environ | {"OMP_NUM_THREADS": threads},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )


def _epochs(name: str) -> list[str]:
    """What a run's log says of its epochs so far."""
    path = RUNS / name / "log.jsonl"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [
        f"epoch {r['epoch']}, validation mAP@10 {100 * r['validation']['mAP@10']:.1f} %"
        for r in records
        if "validation" in r
    ]


def table(seeds: list[int]) -> str:
    """Table 1's four rows in percent: means over seeds, and deviations if there are several."""
    lines = [f"{'trained on':31}" + "".join(f"{column:>14}" for column in COLUMNS)]
    for label, datasets in DATASETS.items():
        for kind, how in (("teacher", "contrastive"), ("student", "distilled")):
            files = [RUNS / f"{name_of(datasets, kind, seed)}.json" for seed in seeds]
            results = [json.loads(file.read_text())["results"] for file in files]
            cells = []
            for row, metric in COLUMNS.values():
                values = [100 * result[row][metric] for result in results]
                cell = f"{statistics.mean(values):.1f}"
                if len(values) > 1:
                    cell += f" ± {statistics.stdev(values):.1f}"
                cells.append(f"{cell:>14}")
            lines.append(f"{label + ', ' + how:31}" + "".join(cells))
    return "\n".join(lines)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--seeds", type=number(int, 0), nargs="+", default=[0], metavar="N",
        help="repeat everything but the data with each, and show means and deviations (default 0)",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # see run_all
    start = time.monotonic()
    RUNS.mkdir(parents=True, exist_ok=True)
    print(f"$ python -m dualenc.miniature {DATA}", flush=True)
    made = subprocess.run([sys.executable, "-m", "dualenc.miniature", str(DATA)])
    if made.returncode:  # it has said why
        return made.returncode
    acts = [commands(seed) for seed in args.seeds]
    for act in range(3):
        run_all({name: line for seed in acts for name, line in seed[act].items()})
    print(f"\nPercent on the miniature's test split, {len(args.seeds)} seed(s):\n")
    print(table(args.seeds))
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes. Search it: python -m dualenc.search "
          f'"a dog barks" --audio {DATA}/CLOTHO_v2.1 '
          f"--checkpoint {RUNS / name_of('clotho audiocaps', 'student', args.seeds[0])}/best.pt")


if __name__ == "__main__":
    run(main)

"""Kill training and distillation again and again, longer than the test suite does.

    python tests/kill_longer.py 200

Prints for each command how many runs were completed, and how many ended in another way than one
that was left alone. The exit status is 1 where any did.
"""

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_kill import kill_again_and_again, undisturbed, write_sounds  # noqa: E402


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    rng, found = random.Random(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stage in ("train", "distill"):
            (folder / stage).mkdir()
            write_sounds(folder / stage / "sounds")
        for seed in ("1", "2"):
            undisturbed("train", ["--preset", "tiny", "--seed", seed], folder / "distill" / seed)
        teachers = [str(folder / "distill" / seed / "runs/run/best.pt") for seed in ("1", "2")]
        commands = {"train": ["--preset", "tiny"], "distill": ["--teachers", *teachers]}
        for script, arguments in commands.items():
            within, runs, differing = kill_again_and_again(
                script, arguments, folder / script, kills, rng
            )
            print(f"{script}: {kills} kills, {within} within a checkpoint's write; {runs} runs, "
                  f"{len(differing)} differing", *differing, sep="\n  ", flush=True)
            found += differing
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

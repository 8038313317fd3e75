"""A checkout of ESC-50 in Clotho's layout: real recordings to train and test on.

    git clone https://github.com/karolpiczak/ESC-50
    python benchmarks/esc50.py ESC-50 --fold 1 --out data/esc10-1      # --all: fifty kinds, not ten

The fold is tested on, the next one validates, the other three train. The script prints the commands
that train two teachers, a student, and a model trained for as long without teachers, and that
compare them. The sounds are links into the checkout.
"""

import argparse
import csv
from pathlib import Path

CAPTIONS = (
    "a {} sound", "the sound of {}", "{} can be heard", "a recording of {}", "this is {}",
)
COMMANDS = r"""all="--data-dir {data} --batch-size 32 --captions-per-clip 2"
teacher="$all --preset tiny --epochs 8 --decay-epochs 7"
student="$all --max-lr 5e-4 --epochs 5 --decay-epochs 4"
python train.py $teacher --seed 0 --out {runs}/teacher0
python train.py $teacher --seed 1 --out {runs}/teacher1
python distill.py $student --out {runs}/student --teachers {runs}/teacher{{0,1}}/best.pt
python train.py $student --out {runs}/longer --init {runs}/teacher0/best.pt   # without teachers
python evaluate.py --data-dir {data} --json {runs}/table.json \
    --checkpoint {runs}/{{teacher0,longer,student}}/best.pt"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="a clone of karolpiczak/ESC-50")
    parser.add_argument("--fold", type=int, choices=range(1, 6), default=1, help="the test fold")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--all", action="store_true", help="all fifty kinds, not ESC-10's ten")
    return parser.parse_args()


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def main() -> None:
    args = parse_arguments()
    split_of_fold = {args.fold: "evaluation", args.fold % 5 + 1: "validation"}
    rows = {"development": [], "validation": [], "evaluation": []}
    relevant: dict[str, list[str]] = {}  # the test clips of which a caption is true

    with open(args.checkout / "meta" / "esc50.csv", newline="") as file:
        for clip in csv.DictReader(file):
            if clip["esc10"] != "True" and not args.all:
                continue
            split = split_of_fold.get(int(clip["fold"]), "development")
            name = clip["filename"]
            sound = clip["category"].replace("_", " ")
            captions = [caption.format(sound) for caption in CAPTIONS]
            rows[split].append([name, *captions])
            if split == "evaluation":
                for caption in captions:
                    relevant.setdefault(caption, []).append(name)
            link = args.out / split / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to((args.checkout / "audio" / name).resolve())

    header = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
    for split, table in rows.items():
        write_csv(args.out / f"clotho_captions_{split}.csv", header, table)
    annotations = [[caption, names] for caption, names in relevant.items()]
    write_csv(args.out / "metadata_eval.csv", ["query", "audio_filenames"], annotations)
    print(COMMANDS.format(data=args.out, runs=f"runs/{args.out.name}"))


if __name__ == "__main__":
    main()

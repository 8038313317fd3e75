"""A checkout of ESC-50 in Clotho's layout: real recordings to train and test on.

    git clone https://github.com/karolpiczak/ESC-50
    python benchmarks/esc50.py ESC-50 --fold 1 --out data/esc10-1      # --all: fifty kinds, not ten

The fold is tested on, the next validates, three train. Prints the commands; sounds are links.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

CAPTIONS = "a {} sound", "the sound of {}", "{} can be heard", "a recording of {}", "this is {}"
COMMANDS = r"""all="--data-dir {data} --batch-size 32 --captions-per-clip 2"
teacher="$all --preset tiny --epochs 8 --decay-epochs 7"
student="$all --max-lr 5e-4 --epochs 5 --decay-epochs 4"
python train.py $teacher --seed 0 --out {runs}/teacher0
python train.py $teacher --seed 1 --out {runs}/teacher1
python distill.py $student --out {runs}/student --teachers {runs}/teacher{{0,1}}/best.pt
python train.py $student --out {runs}/longer --init {runs}/teacher0/best.pt   # without teachers
python evaluate.py --data-dir {data} --json {runs}/table.json \
    --checkpoint {runs}/{{teacher0,longer,student}}/best.pt"""
parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("checkout", type=Path, help="git clone https://github.com/karolpiczak/ESC-50")
parser.add_argument("--fold", type=int, choices=range(1, 6), default=1)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--all", action="store_true")
args = parser.parse_args()
parts = {args.fold: "evaluation", args.fold % 5 + 1: "validation"}
header = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
tables, clips_of = defaultdict(lambda: [header]), defaultdict(list)
for clip in csv.DictReader((args.checkout / "meta" / "esc50.csv").read_text().splitlines()):
    if args.all or clip["esc10"] == "True":
        part, name = parts.get(int(clip["fold"]), "development"), clip["filename"]
        captions = [caption.format(clip["category"].replace("_", " ")) for caption in CAPTIONS]
        tables[f"clotho_captions_{part}.csv"].append([name, *captions])
        for caption in captions if part == "evaluation" else ():
            clips_of[caption].append(name)
        link = args.out / part / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((args.checkout / "audio" / name).resolve())
tables["metadata_eval.csv"] = [["query", "audio_filenames"], *clips_of.items()]
for table, rows in tables.items():
    with open(args.out / table, "w", newline="") as file:
        csv.writer(file).writerows(rows)
print(COMMANDS.format(data=args.out, runs=f"runs/{args.out.name}"))

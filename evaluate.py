"""Checkpoint -> embeddings -> table (report, section 6 and Table 1).

    python evaluate.py --split test                           # the newest run's best.pt
    python evaluate.py --split test --checkpoint runs/NAME/best.pt --json results.json
"""

import ast
import json
from pathlib import Path

from dualenc import InputError, replacing, run
from dualenc.layouts import ANNOTATIONS, CLOTHO_TEST_CLIPS, Split, read_csv, read_split
from dualenc.metrics import METRICS, retrieval_metrics
from dualenc.model import DualEncoder
from dualenc.options import Parser, add_data_options, add_device_options
from dualenc.processes import Processes, embed_split
from dualenc.runs import newest_best
from dualenc.stages import describe, open_caches, place

# Table 1, percent: its first column is called mAP@10 on the new annotations; by the baseline's own
# figures it is mAP@16 there (row 3), and mAP@10 (row 1).
REPORT_COLUMNS = ("new annotations mAP", "mAP@10", "R@1", "R@5", "R@10")
REPORT_TABLE = {
    "Clotho, contrastive": (31.95, 27.57, 16.95, 42.73, 58.04),
    "Clotho, distilled": (32.54, 28.20, 16.44, 43.89, 58.89),
    "Clotho + AudioCaps, contrastive": (35.21, 30.97, 19.56, 46.45, 59.48),
    "Clotho + AudioCaps, distilled": (37.21, 32.75, 19.80, 47.45, 60.48),
}


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("--split", choices=("test", "val", "train"), default="test")
    parser.add_argument(
        "--dataset", default="clotho", metavar="NAME",
        help="clotho, audiocaps, or a folder with a captions.csv (default clotho)",
    )
    parser.add_argument("--checkpoint", type=Path, help="default: the newest run's best.pt")
    parser.add_argument(
        "--annotations", type=Path, metavar="CSV",
        help=f"the new annotations (default DATA_DIR/{ANNOTATIONS} where it is there)",
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="instead of the checkpoint's own")
    parser.add_argument("--allow-seen", action="store_true", help="evaluate on a split trained on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    add_data_options(parser)
    add_device_options(parser)
    return parser.parse_args()


def read_annotations(path: Path, split: Split) -> tuple[list[int], list[list[int]]]:
    """The new annotations: rows of split.captions, and all clips relevant to each.

    Raises:
        InputError: a query or a file name is not the split's, or a list is not one.
    """
    rows_of: dict[str, list[int]] = {}
    for row, caption in enumerate(split.captions):
        rows_of.setdefault(caption, []).append(row)
    clip_of = {clip.name: i for i, clip in enumerate(split.clips)}
    queries, relevant, faults = [], [], []
    for query, names in read_csv(path, ["query", "audio_filenames"]):
        files = _parse_list(names)
        unknown = [name for name in files or () if name not in clip_of]
        if query not in rows_of:
            faults.append(f"query {query!r} is no caption of {split.name}")
        elif files is None:
            faults.append(f"query {query!r}: {names!r} is not a list of file names")
        elif unknown:
            faults.append(f"query {query!r}: {unknown[0]!r} is no clip of {split.name}")
        else:
            queries.append(rows_of[query][0])
            relevant.append(sorted({clip_of[name] for name in files}))
    if faults:
        raise InputError.of(str(path), faults)
    return queries, relevant


def _parse_list(text: str) -> list[str] | None:
    """A Python list literal of strings, never evaluated; None where it is something else."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    right = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    return value if right else None


def evaluate(model, split, cache, annotations, processes) -> dict:
    """All figures of one checkpoint on one split, fractions from 0 to 1."""
    audio, text = embed_split(model, split, cache, processes, f"embedding {split.name}")
    captions_of_clip = [[] for _ in split.clips]
    for row, clip in enumerate(split.clip_of_caption):
        captions_of_clip[clip].append(row)
    results = {
        "text to audio": retrieval_metrics(text, audio, [[c] for c in split.clip_of_caption]),
        "audio to text": retrieval_metrics(audio, text, captions_of_clip),
    }
    if annotations is not None:
        rows, relevant = annotations
        results["text to audio, new annotations"] = retrieval_metrics(text[rows], audio, relevant)
    return results


def print_table(rows: dict[str, dict[str, float]], columns=METRICS) -> None:
    width = max(map(len, rows))
    print(f"{'':{width}}" + "".join(f"{name:>9}" for name in columns))
    for name, row in rows.items():
        cells = (f"{100 * row[c]:9.2f}" if c in row else f"{'-':>9}" for c in columns)
        print(f"{name:{width}}" + "".join(cells))


def main() -> int:
    args = parse_arguments()
    checkpoint = args.checkpoint or newest_best()
    processes = Processes.start(args.device)
    split = read_split(args.dataset, args.split, args.data_dir)
    is_clotho_test = split.name == "clotho/evaluation"
    path = args.annotations or args.data_dir / ANNOTATIONS
    annotations = None
    if args.annotations or (is_clotho_test and path.exists()):
        annotations = read_annotations(path, split)
    model = place(DualEncoder.load(checkpoint, tokenizer=args.tokenizer), args, processes)
    if split.name in model.trained_on and not args.allow_seen:
        raise InputError(
            f"{checkpoint} was trained on {split.name}: figures on it say nothing; take another "
            "--split or --dataset, or give --allow-seen"
        )
    (cache,) = open_caches([split], args, processes)
    results = evaluate(model, split, cache, annotations, processes)
    if not processes.first:
        return 0
    print(f"checkpoint  {checkpoint}" + ("" if args.checkpoint else " (the newest run's)"))
    print(f"evaluate on {describe(split, cache)}")
    print_table(results)
    if is_clotho_test and len(split.clips) + len(split.missing) == CLOTHO_TEST_CLIPS:
        ...
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run(main)

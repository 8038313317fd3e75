"""Checkpoints -> embeddings -> Table 1 with confidence intervals (report, section 6).

    python evaluate.py --split test                               # the newest run's best.pt
    python evaluate.py --split test --checkpoint A.pt B.pt C.pt   # a row each
    python evaluate.py --split test --ensemble A.pt B.pt          # one row of both
    python evaluate.py --split test --html page.html              # to look at and listen to
    python evaluate.py --dataset my_sounds/ --split val           # what was held out of a folder
    python evaluate.py --submission out.csv --queries queries.csv --audio FOLDER
"""

import ast
import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dualenc.checkpoints import newest_checkpoint, read_checkpoint
from dualenc.data import Split, decode_splits, read_csv, read_split, split_of_sounds, was_seen
from dualenc.errors import InputError, Parser, replacing, run_command
from dualenc.metrics import METRICS, bootstrap, interval, query_metrics, ranks
from dualenc.model import PRECISIONS, DualEncoder, choose_device, choose_precision
from dualenc.page import Evaluation, write_evaluation

CAPTIONS, NEW = "captions", "new annotations"  # what says which clips are relevant to a query
COLUMNS = {  # of the table: (what says so, metric)
    "new mAP@16": (NEW, "mAP@16"), "new mAP@10": (NEW, "mAP@10"), "mAP@10": (CAPTIONS, "mAP@10"),
    "R@1": (CAPTIONS, "R@1"), "R@5": (CAPTIONS, "R@5"), "R@10": (CAPTIONS, "R@10"),
}
TITLES = {"clotho": "Clotho", "audiocaps": "AudioCaps", "wavcaps": "WavCaps"}
SURE_CLIPS = 100  # from which on 94 % of the intervals hold the truth; with 10 clips 82 % do
REPORT = {  # Table 1, in percent; row 3's first figure is the baseline's mAP@16, row 1's its mAP@10
    "Clotho, contrastive": ("-", 31.95, 27.57, 16.95, 42.73, 58.04),
    "Clotho, distilled": ("-", 32.54, 28.20, 16.44, 43.89, 58.89),
    "Clotho + AudioCaps, contrastive": (35.21, "-", 30.97, 19.56, 46.45, 59.48),
    "Clotho + AudioCaps, distilled": ("-", 37.21, 32.75, 19.80, 47.45, 60.48),
}


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--split", choices=("test", "val", "train", "all"), default="test", help="all: of a folder")
    add("--dataset", default="clotho", help="clotho, audiocaps, or a folder with a captions.csv")
    add("--checkpoint", type=Path, nargs="+", default=[], help="a row each (default: the newest)")
    add("--ensemble", type=Path, nargs="+", help="a row for all of them, by their mean similarity")
    add("--annotations", type=Path, help="the new ones (default DATA_DIR/metadata_eval.csv)")
    add("--allow-seen", action="store_true", help="evaluate on what was trained on, and mark it")
    add("--json", type=Path, help="a file to write the figures to, too, as fractions")
    add("--html", type=Path, help="a file to write a page to, to look at and listen to")
    add("--submission", type=Path, help="a csv to write similarities to, as DCASE 2025 asks")
    add("--queries", type=Path, help="of the submission: a csv with a column caption")
    add("--audio", type=Path, help="of the submission: a folder of the clips to rank")
    add("--data-dir", type=Path, default=Path("data"), help="where data sets lie (default data)")
    add("--cache-dir", type=Path, help="of decoded sounds (default DATA_DIR/cache)")
    add("--tokenizer", help="a name or folder, in place of a checkpoint's own")
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: cuda where there is one)")
    add("--precision", choices=("auto", *PRECISIONS), default="auto", help="of the towers")
    args = parser.parse_args()
    if not (args.checkpoint or args.ensemble):
        args.checkpoint = [newest_checkpoint()]
    if len(args.checkpoint) + bool(args.ensemble) > 1 and (args.html or args.submission):
        parser.error("--html and --submission take one --checkpoint, or one --ensemble")
    if bool(args.queries) != bool(args.audio) or args.audio and (args.html or not args.submission):
        parser.error("--queries, --audio and --submission go together, without --html")
    for path in filter(None, (args.json, args.html, args.submission)):
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise InputError(f"{path}: cannot be written; name a file in a folder that is there")
    return args


def main() -> int:
    args = parse_arguments()
    device = choose_device(args.device)

    # --- What is ranked, and by which models ---
    if args.audio:
        split = split_of_sounds(args.audio)
        queries = [row["caption"] for row in read_csv(args.queries, ["caption"])]
    else:
        split = read_split(args.dataset, args.split, args.data_dir)
        queries = split.captions
    new = args.annotations or args.data_dir / "metadata_eval.csv"
    wanted = args.annotations or (split.name == "clotho/evaluation" and new.exists())
    annotations = read_annotations(new, split) if wanted and not args.audio else {}
    models = [[path] for path in args.checkpoint] + [args.ensemble] * bool(args.ensemble)
    seen = [refuse_seen(paths, split, args.allow_seen) for paths in models]

    # --- Embed it with each model ---
    decode_splits([split], args.cache_dir or args.data_dir / "cache")
    print(f"evaluate on {split}")
    rows = []
    for paths, any_seen in zip(models, seen, strict=True):
        members, labels = [], []
        for path in paths:
            model = DualEncoder.load(path, device, args.tokenizer)
            model.precision = choose_precision(args.precision, device)
            bar = tqdm(split.waveforms, f"{path} embeds", unit="clip", leave=False, disable=None)
            members.append((model.embed_audio(bar), model.embed_text(queries)))
            labels.append(label_of(model))
        label = " and ".join(dict.fromkeys(labels)) + ", ensemble" * (len(paths) > 1)
        name, (audio, text) = " + ".join(map(str, paths)), joined(members)
        figures = {} if args.audio else measure(audio, text, split, annotations)
        rows.append(Row(name, label, any_seen, audio, text, figures))
        print(f"checkpoint  {name}: {label}")

    # --- Table 1, and the files ---
    if not args.audio:
        lines = table(rows, split)
        about = "In percent, with 95 % confidence intervals from a bootstrap over clips."
        if annotations:
            about += (f"\nnew: by the new annotations, {len(annotations):,} queries of several "
                      "clips; R@k by them (--json): any relevant clip within k.")
        print(f"\n{as_text(list(COLUMNS), lines)}\n\n{about}")
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(as_json(rows), indent=1) + "\n")
    if args.submission:
        write_submission(args.submission, queries, split, rows[0])
    if args.html:
        runs = [path if path.is_dir() else path.parent for path in models[0]]
        write_evaluation(args.html, Evaluation(
            title=f"{rows[0].label} on {split.name}", about=f"{split}\n{about}",
            columns=list(COLUMNS), lines=lines, run_folders=runs,
            clip_names=[clip.name for clip in split.clips],
            clip_paths=[clip.path for clip in split.clips],
            captions=split.captions, clip_of_caption=split.clip_of_caption,
            text=rows[0].text, audio=rows[0].audio, annotations=annotations,
        ))
    return 0


# --- What may be evaluated on, and what is relevant ---

def refuse_seen(paths: Sequence[Path], split: Split, allowed: bool) -> bool:
    """Whether a model has seen the split in training; unless that is allowed, an InputError."""
    seen = [path for path in paths if was_seen(split, read_checkpoint(path)["trained_on"])]
    if seen and not allowed:
        raise InputError(f"{seen[0]}: was trained on {split.name}, on which figures flatter; take "
                         "another --split or --dataset, or --allow-seen, which marks them")
    return bool(seen)


def read_annotations(path: Path, split: Split) -> dict[int, list[int]]:
    """The new annotations, {caption: its relevant clips}, without clips that are not on disk.

    Queries match captions byte for byte; what is not the split's, or no list, is an InputError.
    """
    row_of = {caption: row for row, caption in reversed(list(enumerate(split.captions)))}
    clip_of = {clip.name: i for i, clip in enumerate(split.clips)}
    found, faults = {}, []
    for row in read_csv(path, ["query", "audio_filenames"]):
        query, text = row["query"], row["audio_filenames"]
        try:
            names = list(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError):
            names = [text]
        unknown = [n for n in names if n not in clip_of and n not in split.missing]
        if unknown or (query not in row_of and not split.missing):
            what = f"{unknown[0]!r} is no clip" if unknown else "it is no caption"
            faults.append(f"query {query!r}: {what} of {split.name}")
        elif query in row_of and (clips := {clip_of[name] for name in names if name in clip_of}):
            found[row_of[query]] = sorted(clips)
    if faults:
        raise InputError.of(str(path), faults)
    return found


# --- Figures: {what says so: {metric: (1001,), the mean and its means in resamples}} ---

class Row(NamedTuple):
    """One model, or an ensemble, on a split: audio (N, D) and text (Q, D) embeddings, figures."""

    name: str
    label: str
    seen: bool
    audio: Tensor
    text: Tensor
    figures: dict[str, dict[str, np.ndarray]]


def label_of(model: DualEncoder) -> str:
    """What a model is, in Table 1's words: "Clotho + AudioCaps, distilled"."""
    names = {name.partition("/")[0] for name in model.trained_on}
    others = sorted(name.partition("@")[0] for name in names - TITLES.keys())
    known = [title for name, title in TITLES.items() if name in names]
    return f"{' + '.join(known + others)}, {model.stage}"


def joined(members: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(audio, text) of each member of an ensemble -> of the whole, of unit norm again.

    Their product is the mean of the members' similarities. Widths may differ.
    """
    audio, text = (torch.cat(side, dim=1) for side in zip(*members, strict=True))
    return audio / len(members) ** 0.5, text / len(members) ** 0.5


def measure(audio: Tensor, text: Tensor, split: Split, annotations: dict) -> dict:
    """The figures of one model; the resamples of the clips are the same for every model."""
    own = {i: [clip] for i, clip in enumerate(split.clip_of_caption)}
    figures = {}
    for kind, relevant in {CAPTIONS: own, NEW: annotations}.items():
        if relevant:
            queries = list(relevant)
            values = query_metrics(ranks(text[queries], audio, list(relevant.values())))
            draws = bootstrap(values, np.array(split.clip_of_caption)[queries])
            figures[kind] = {m: np.append(values[m].mean(), draws[m]) for m in METRICS}
    return figures


def each(function: Callable, *figures: dict) -> dict:
    """{what says so: {metric: function of its values}}, of one model's figures or of several."""
    return {k: {m: function(*(f[k][m] for f in figures)) for m in METRICS} for k in figures[0]}


def summary(figures: dict) -> dict[str, dict]:
    means, intervals = (lambda values: float(values[0])), (lambda values: interval(values[1:]))
    return {"results": each(means, figures), "intervals": each(intervals, figures)}


def spreads(rows: Sequence[Row]) -> dict[str, tuple[int, dict, dict]]:
    """Of each label that has several rows: (how many, means, standard deviations)."""
    found = {}
    for label in dict.fromkeys(row.label for row in rows):
        own = [row.figures for row in rows if row.label == label]
        if len(own) > 1:
            means = each(lambda *v: float(np.mean([x[0] for x in v])), *own)
            deviations = each(lambda *v: float(np.std([x[0] for x in v], ddof=1)), *own)
            found[label] = len(own), means, deviations
    return found


# --- As text, JSON and csv ---

def table(rows: Sequence[Row], split: Split) -> list[tuple[str, list[str]]]:
    """(label, cells in the order of COLUMNS): the rows, their spreads, the report's Table 1."""
    several, lines = spreads(rows), []
    interval_of = "95 % interval" + " (too short)" * (len(split.clips) < SURE_CLIPS)
    for row in rows:
        label = row.label + f": {row.name}" * (row.label in several) + " (seen)" * row.seen
        results, intervals = map(cells, summary(row.figures).values())
        lines += [(label, results), (f"  {interval_of}", intervals)]
        if row is not rows[0]:
            lead = summary(each(np.subtract, row.figures, rows[0].figures)).values()
            results, intervals = (cells(figures, "+") for figures in lead)
            lines += [("  lead over the first", results), (f"    {interval_of}", intervals)]
    for label, (count, means, deviations) in several.items():
        lines.append((f"{label}: mean of {count}", cells(means)))
        lines.append(("  standard deviation", cells(deviations)))
    if split.name == "clotho/evaluation" and len(split.clips) == 1045:  # the real, whole one
        lines += [(f"report: {label}", list(map(str, row))) for label, row in REPORT.items()]
    return lines


def as_text(columns: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table for a terminal, of the same columns and lines as the page's."""
    first = max(len(label) for label, _ in lines)
    width = 2 + max(len(cell) for cells in [columns, *(row for _, row in lines)] for cell in cells)
    rows = [(label, "".join(f"{cell:>{width}}" for cell in row)) for label, row in
            [("", columns), *lines]]
    return "\n".join(f"{label:{first}}{cells}" for label, cells in rows)


def cells(figures: dict[str, dict], sign: str = "") -> list[str]:
    """Fractions, or intervals of two -> percent, column by column."""
    found = [np.atleast_1d(figures.get(kind, {}).get(m, ())) for kind, m in COLUMNS.values()]
    return ["..".join(f"{100 * value:{sign}.2f}" for value in values) or "-" for values in found]


def as_json(rows: Sequence[Row]) -> dict:
    """Fractions: every figure of every row, and of rows of one label together."""
    return {
        "rows": [
            {"name": row.name, "label": row.label, "seen": row.seen, **summary(row.figures),
             "lead": summary(each(np.subtract, row.figures, rows[0].figures))}
            for row in rows
        ],
        "groups": [
            {"label": label, "rows": count, "mean": means, "standard deviation": deviations}
            for label, (count, means, deviations) in spreads(rows).items()
        ],
    }


def write_submission(path: Path, queries: Sequence[str], split: Split, row: Row) -> None:
    """DCASE 2025's csv: a row per query, a column per sound file, in each cell their similarity."""
    asked = list(dict.fromkeys(queries))
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", *(clip.name for clip in split.clips)])
        for query in asked:
            values = (row.audio @ row.text[queries.index(query)]).tolist()
            writer.writerow([query, *(f"{value:.9g}" for value in values)])
    print(f"submission  {path}: {len(asked):,} queries, {len(split.clips):,} clips")


if __name__ == "__main__":
    run_command(main)

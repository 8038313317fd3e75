"""Evaluation of checkpoints: embeddings -> Table 1 with confidence intervals (report, section 6).

    python evaluate.py --split test                               # the newest run's best.pt
    python evaluate.py --split test --checkpoint A.pt B.pt C.pt   # a row for each
    python evaluate.py --split test --ensemble A.pt B.pt          # one row for both together
    python evaluate.py --split test --html page.html              # a page to look at and listen to
    python evaluate.py --dataset my_sounds/ --split val           # what was held out of a folder
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dualenc.checkpoints import checkpoint_file, newest_checkpoint, read_checkpoint
from dualenc.data import (
    Split, dataset_names, decode_splits, parse_names, read_csv, read_split, was_seen,
)
from dualenc.errors import InputError, Parser, check_output_file, replacing, run_command
from dualenc.metrics import METRICS, RESAMPLES, bootstrap, interval, query_metrics, ranks
from dualenc.model import PRECISIONS, DualEncoder, choose_device, choose_precision
from dualenc.page import Evaluation, write_evaluation

# Shapes: N clips, Q captions, each of them a query, D embedding values. Figures are fractions from
# 0 to 1; the table shows them in percent.

# Two sources tell which clips are relevant to a query: the captions themselves, each of which
# belongs to one clip, and the new annotations, which name all clips that fit. Metrics by the new
# annotations are called "new ...".
COLUMNS = ("new mAP@16", "new mAP@10", "mAP@10", "R@1", "R@5", "R@10")
# What data sets are called in labels; the published models may have been trained on WavCaps, too.
TITLES = {"clotho": "Clotho", "audiocaps": "AudioCaps", "wavcaps": "WavCaps"}

# Intervals from fewer clips are marked as too narrow: they cover the true value in 82 % of cases at
# 10 clips, and in 94 % at 100.
CLIPS_FOR_AN_INTERVAL = 100

# The report's Table 1, in percent, in the order of COLUMNS. It is shown beside results on the split
# that it was measured on: Clotho v2.1's evaluation split with all its clips. What the report calls
# baseline models, rows 1 and 3, is the official DCASE 2025 baseline, which is trained as stage 1 is
# here. The report's first column, "mAP@10 (new annotations)", mixes two metrics: by the history of
# the baseline's README, 31.95 is its mAP@10 and 35.21 its mAP@16. So they stand in different
# columns here. None: the report has no such figure.
REPORTED_SPLIT = "clotho/evaluation"
REPORTED_CLIPS = 1045
REPORTED_ROWS = {
    "Clotho, contrastive": (None, 31.95, 27.57, 16.95, 42.73, 58.04),
    "Clotho, distilled": (None, 32.54, 28.20, 16.44, 43.89, 58.89),
    "Clotho + AudioCaps, contrastive": (35.21, None, 30.97, 19.56, 46.45, 59.48),
    "Clotho + AudioCaps, distilled": (None, 37.21, 32.75, 19.80, 47.45, 60.48),
}
REPORTED_NOTE = (
    "report: the first column of its Table 1 mixes two metrics. 31.95 (row 1) is the official "
    "baseline's mAP@10, 35.21 (row 3) its mAP@16. 32.54 and 37.21 stand where its heading puts "
    "them, under mAP@10."
)


def parse_arguments():
    parser = Parser(__doc__)

    models = parser.add_argument_group("models")
    models.add_argument(
        "--checkpoint", nargs="+", default=[], metavar="CHECKPOINT",
        help="checkpoints, run folders, or published ones by name (baseline, DCASE 2025's official "
        "one, or salsa, that of Primus et al. 2024), each a row of the table (default: the newest "
        "runs/**/best.pt)",
    )
    models.add_argument(
        "--ensemble", nargs="+", default=[], metavar="CHECKPOINT",
        help="checkpoints whose mean similarity ranks the clips, together a row of the table",
    )
    models.add_argument(
        "--tokenizer", help="tokenizer for checkpoints that hold none, a name or folder"
    )
    models.add_argument(
        "--device", default="auto", help="cpu, cuda or cuda:N (default: cuda where there is one)"
    )
    models.add_argument(
        "--precision", choices=("auto", *PRECISIONS), default="auto",
        help="autocast type of both encoders (default: bf16 or fp16 on a GPU, fp32 on a CPU)",
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset", default="clotho",
        help="clotho, audiocaps, or a folder with a captions.csv (default clotho)",
    )
    data.add_argument(
        "--split", choices=("test", "val", "train", "all"), default="test",
        help="part of the data set: test, val or train; a folder's are val (held out), train and "
        "all (default test)",
    )
    data.add_argument(
        "--annotations", metavar="FILE",
        help="csv of the new annotations, or none to evaluate without them (default: "
        "DATA_DIR/metadata_eval.csv for Clotho's test split)",
    )
    data.add_argument(
        "--allow-seen", action="store_true",
        help="evaluate even on clips that a model was trained on, and mark its row",
    )
    data.add_argument(
        "--data-dir", type=Path, default=Path("data"),
        help="folder in which the data sets lie (default data)",
    )
    data.add_argument(
        "--cache-dir", type=Path, help="folder for decoded sounds (default DATA_DIR/cache)"
    )

    files = parser.add_argument_group("files to write")
    files.add_argument("--json", type=Path, metavar="FILE", help="write all figures, as fractions")
    files.add_argument(
        "--html", type=Path, metavar="FILE",
        help="write a page of one model or ensemble, to look at and listen to",
    )

    args = parser.parse_args()
    if not args.checkpoint and not args.ensemble:
        args.checkpoint = [str(newest_checkpoint())]
    if args.html and len(args.checkpoint) + bool(args.ensemble) > 1:
        parser.error("--html takes one --checkpoint, or one --ensemble")
    for path in (args.json, args.html):
        if path:
            check_output_file(path)
    return args


def main() -> None:
    args = parse_arguments()
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)

    # --- The split, and the new annotations of its captions ---
    split = read_split(args.dataset, args.split, args.data_dir)
    annotations_csv = choose_annotations(args.annotations, split, args.data_dir)
    annotations = {}
    if annotations_csv:
        annotations = read_annotations(annotations_csv, split)

    # --- The models, as their checkpoints describe them: none may have seen the split ---
    # A row is one checkpoint, or all members of the ensemble.
    members_of_rows = [[name] for name in args.checkpoint]
    if args.ensemble:
        members_of_rows.append(args.ensemble)
    models = {}
    for name in [*args.checkpoint, *args.ensemble]:
        models[name] = describe_model(name, split)
        if models[name].seen and not args.allow_seen:
            raise InputError(
                f"{name}: was trained on {split.name}, so its figures there would be too good; "
                "give another --split or --dataset, or --allow-seen, which marks the row"
            )

    # --- Embed the split with each model ---
    decode_splits([split], args.cache_dir or args.data_dir / "cache")
    print(f"evaluate on {split}")
    embeddings = {}
    for name, model in models.items():
        encoder = DualEncoder.load(model.file, device, args.tokenizer)
        encoder.precision = precision
        progress = tqdm(split.waveforms, f"{name} embeds", unit="clip", leave=False, disable=None)
        audio = encoder.embed_audio(progress)  # (N, D)
        text = encoder.embed_text(split.captions)  # (Q, D)
        embeddings[name] = (audio, text)
        print(f"checkpoint  {name}: {model.label}")

    # --- Rank, and measure: a row for each model or ensemble ---
    rows = []
    for names in members_of_rows:
        members = [models[name] for name in names]
        audio, text = join_embeddings([embeddings[name] for name in names])
        estimates = estimate_metrics(audio, text, split, annotations)
        rows.append(Row(members, audio, text, estimates))

    # --- Table 1 ---
    lines = table_lines(rows, split)
    notes = table_notes(split, annotations, annotations_csv)
    print(f"\n{as_text(COLUMNS, lines)}\n")
    print("\n".join(notes))

    # --- The files ---
    facts = {
        "data set": args.dataset,
        "split": split.name,
        "captions": str(split.source),
        "clips": len(split.clips),
        "clips not on disk": len(split.missing),
        "queries": len(split.captions),
        "annotations": str(annotations_csv) if annotations_csv else None,
        "annotated queries": len(annotations),
        "resamples": RESAMPLES,
        "device": str(device),
        "precision": "fp32" if precision is None else str(precision).removeprefix("torch."),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(as_json(facts, rows), indent=1) + "\n")
        print(f"figures  {args.json}")
    if args.html:
        (row,) = rows
        write_evaluation(args.html, page_of(row, facts, lines, notes, split, annotations))
        print(f"page  {args.html}")


# --- What is relevant: the new annotations ---


def choose_annotations(option: str | None, split: Split, data_dir: Path) -> Path | None:
    """Return the csv of the new annotations, or None where the split is evaluated without them.

    Raises InputError where --annotations names a file that is not there.
    """
    if option == "none":
        return None
    if option is not None:
        if not Path(option).is_file():
            raise InputError(f"--annotations {option}: no such file; name the csv, or none")
        return Path(option)
    if split.name != "clotho/evaluation":
        return None
    path = data_dir / "metadata_eval.csv"
    if not path.is_file():
        print(f"{path}: not there, so the columns of the new annotations stay empty")
        return None
    return path


def read_annotations(path: Path, split: Split) -> dict[int, list[int]]:
    """Read the new annotations: {index of a caption: indices of its relevant clips, ascending}.

    Queries match captions byte for byte. Clips that are not on disk are left out.

    Raises InputError where the csv names a clip or a caption that is not the split's.
    """
    index_of_caption: dict[str, int] = {}
    for index, caption in enumerate(split.captions):
        index_of_caption.setdefault(caption, index)  # Where captions are equal, the first counts.
    index_of_clip = {clip.name: index for index, clip in enumerate(split.clips)}

    annotations = {}
    faults = []
    for csv_row in read_csv(path, ["query", "audio_filenames"]):
        query = csv_row["query"]
        names = parse_names(csv_row["audio_filenames"])
        unknown = []
        for name in names:
            if name not in index_of_clip and name not in split.missing:
                unknown.append(name)
        if unknown:
            faults.append(f"query {query!r}: {unknown[0]!r} is no clip of {split.name}")
            continue
        if query not in index_of_caption:
            # Captions of clips that are not on disk are unknown: the query may be one of them.
            if not split.missing:
                faults.append(f"query {query!r}: it is no caption of {split.name}")
            continue
        clips = {index_of_clip[name] for name in names if name in index_of_clip}
        # A query is left out where none of its relevant clips is on disk.
        if clips:
            annotations[index_of_caption[query]] = sorted(clips)
    if faults:
        raise InputError.of(str(path), faults)
    return annotations


# --- The models ---


class Model(NamedTuple):
    """A model as its checkpoint describes it, before its weights are loaded."""

    name: str  # the path or published name that was given
    file: Path
    stage: str
    trained_on: list[str]
    seen: bool  # whether it was trained on the split, or on a part of it

    @property
    def label(self) -> str:
        return label_of(self.stage, self.trained_on)


def describe_model(name: str, split: Split) -> Model:
    """Read what a checkpoint tells of its model, and whether that has seen the split."""
    file = checkpoint_file(name)
    checkpoint = read_checkpoint(file)
    trained_on = checkpoint["trained_on"]
    return Model(name, file, checkpoint["stage"], trained_on, was_seen(split, trained_on))


def label_of(stage: str, trained_on: Sequence[str]) -> str:
    """Name a model by its data and its stage: "Clotho + AudioCaps, distilled"."""
    datasets = dataset_names(trained_on)
    known = [title for dataset, title in TITLES.items() if dataset in datasets]
    folders = [dataset for dataset in datasets if dataset not in TITLES]
    return f"{' + '.join(known + folders)}, {stage}"


def join_embeddings(members: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the audio (N, D) and text (Q, D) embeddings of an ensemble, of unit norm.

    `members` are the (audio, text) embeddings of its models, whose widths may differ. When they are
    joined side by side, a product of audio and text is the sum of the members' cosines; once both
    are scaled to unit norm, it is their mean.
    """
    audio = torch.cat([audio for audio, _ in members], dim=1)
    text = torch.cat([text for _, text in members], dim=1)
    scale = len(members) ** 0.5
    return audio / scale, text / scale


# --- Figures ---


class Estimate(NamedTuple):
    """One metric on the split, and on resamples of its clips (bootstrap)."""

    value: float
    resamples: np.ndarray  # (1000,)

    def lead_over(self, other: "Estimate") -> "Estimate":
        """Subtract the other, draw by draw: both were resampled with the same clips."""
        return Estimate(self.value - other.value, self.resamples - other.resamples)

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the bounds of the 95 % confidence interval."""
        return interval(self.resamples)


def estimate_metrics(
    audio: Tensor, text: Tensor, split: Split, annotations: dict[int, list[int]]
) -> dict[str, Estimate]:
    """Estimate every metric by the captions and, as "new ...", by the new annotations if any."""
    clip_of_caption = np.array(split.clip_of_caption)
    relevant = clip_of_caption[:, None].tolist()  # one clip for each caption
    estimates = estimate_by(relevant, clip_of_caption, audio, text)
    if annotations:
        queries = list(annotations)
        relevant = list(annotations.values())
        annotated = estimate_by(relevant, clip_of_caption[queries], audio, text[queries])
        for metric, estimate in annotated.items():
            estimates[f"new {metric}"] = estimate
    return estimates


def estimate_by(
    relevant: Sequence[Sequence[int]], clip_of_query: np.ndarray, audio: Tensor, text: Tensor
) -> dict[str, Estimate]:
    """Estimate every metric of queries, each with its own relevant clips.

    Args:
        relevant: for each query the indices of its relevant clips.
        clip_of_query: (Q,), the clip that the query was written for.
        audio, text: (N, D), (Q, D).
    """
    values = query_metrics(ranks(text, audio, relevant))
    resamples = bootstrap(values, clip_of_query)
    estimates = {}
    for metric in METRICS:
        estimates[metric] = Estimate(values[metric].mean().item(), resamples[metric])
    return estimates


class Row(NamedTuple):
    """A model, or an ensemble of several, on the split: a row of Table 1."""

    members: list[Model]
    audio: Tensor  # (N, D)
    text: Tensor  # (Q, D)
    estimates: dict[str, Estimate]

    @property
    def name(self) -> str:
        return " + ".join(model.name for model in self.members)

    @property
    def label(self) -> str:
        labels = dict.fromkeys(model.label for model in self.members)  # each once, in order
        text = " and ".join(labels)
        if len(self.members) > 1:
            text += ", ensemble"
        return text

    @property
    def seen(self) -> bool:
        return any(model.seen for model in self.members)

    @property
    def values(self) -> dict[str, float]:
        return {name: estimate.value for name, estimate in self.estimates.items()}

    def leads_over(self, other: "Row") -> dict[str, Estimate]:
        """Subtract the other row's estimates, metric by metric."""
        leads = {}
        for name, estimate in self.estimates.items():
            leads[name] = estimate.lead_over(other.estimates[name])
        return leads


class Group(NamedTuple):
    """Several rows of one label, such as runs that differ in their seeds."""

    label: str
    names: list[str]
    means: dict[str, float]
    deviations: dict[str, float]  # sample standard deviations (the divisor is rows - 1)


def group_rows(rows: Sequence[Row]) -> list[Group]:
    """Average the rows that share a label; a label of one row makes no group."""
    rows_of_label: dict[str, list[Row]] = {}
    for row in rows:
        rows_of_label.setdefault(row.label, []).append(row)
    groups = []
    for label_of_rows, members in rows_of_label.items():
        if len(members) == 1:
            continue
        means = {}
        deviations = {}
        for name in members[0].values:
            values = [row.values[name] for row in members]
            means[name] = float(np.mean(values))
            deviations[name] = float(np.std(values, ddof=1))
        groups.append(Group(label_of_rows, [row.name for row in members], means, deviations))
    return groups


# --- Table 1: as text, on the page, as JSON ---


def table_lines(rows: Sequence[Row], split: Split) -> list[tuple[str, list[str]]]:
    """Return the table's lines: (label, cells in the order of COLUMNS).

    A line that explains the row above has a label that begins with spaces.
    """
    interval_label = "95 % interval"
    if len(split.clips) < CLIPS_FOR_AN_INTERVAL:
        interval_label += " (too narrow: few clips)"
    groups = group_rows(rows)
    averaged = [group.label for group in groups]

    lines = []
    for row in rows:
        row_label = row.label
        if row.label in averaged:
            row_label += f": {row.name}"
        if row.seen:
            row_label += " (seen)"
        lines.append((row_label, cells(row.values)))
        lines.append((f"  {interval_label}", interval_cells(row.estimates)))
        if row is not rows[0]:
            leads = row.leads_over(rows[0])
            lead_values = {name: lead.value for name, lead in leads.items()}
            lines.append(("  lead over the first", cells(lead_values, sign="+")))
            lines.append((f"    {interval_label}", interval_cells(leads, sign="+")))
    for group in groups:
        lines.append((f"{group.label}: mean of {len(group.names)}", cells(group.means)))
        lines.append(("  standard deviation", cells(group.deviations)))
        for name in group.names:
            lines.append((f"  averaged: {name}", [""] * len(COLUMNS)))
    if is_reported(split):
        for row_label, percents in REPORTED_ROWS.items():
            reported = ["-" if percent is None else f"{percent:.2f}" for percent in percents]
            lines.append((f"report: {row_label}", reported))
    return lines


def is_reported(split: Split) -> bool:
    """Tell whether the split is the one of the report's Table 1, with all its clips."""
    return split.name == REPORTED_SPLIT and len(split.clips) == REPORTED_CLIPS


def cells(values: dict[str, float], sign: str = "") -> list[str]:
    """Write fractions in percent, column by column."""
    texts = []
    for column in COLUMNS:
        if column in values:
            texts.append(f"{100 * values[column]:{sign}.2f}")
        else:
            texts.append("-")
    return texts


def interval_cells(estimates: dict[str, Estimate], sign: str = "") -> list[str]:
    """Write the intervals in percent, column by column."""
    texts = []
    for column in COLUMNS:
        if column in estimates:
            low, high = estimates[column].bounds
            texts.append(f"{100 * low:{sign}.2f}..{100 * high:{sign}.2f}")
        else:
            texts.append("-")
    return texts


def table_notes(split: Split, annotations: dict, annotations_csv: Path | None) -> list[str]:
    """Return what a reader must know of the table, as lines."""
    notes = [
        "In percent, with 95 % confidence intervals from a bootstrap over clips "
        f"({RESAMPLES:,} resamples)."
    ]
    if annotations_csv:
        notes.append(
            f"new: by the new annotations ({annotations_csv}), which name all clips that fit a "
            f"query; queries: {len(annotations):,}. The file of --json holds R@k by them, too."
        )
    if is_reported(split):
        notes.append(REPORTED_NOTE)
    return notes


def as_text(columns: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Lay out a table for a terminal."""
    lines = [("", columns), *lines]
    label_width = max(len(row_label) for row_label, _ in lines)
    cell_width = 0
    for _, texts in lines:
        cell_width = max(cell_width, *(len(text) for text in texts))
    table = []
    for row_label, texts in lines:
        padded = [f"{text:>{cell_width + 2}}" for text in texts]
        table.append(f"{row_label:{label_width}}{''.join(padded)}".rstrip())
    return "\n".join(table)


def page_of(
    row: Row,
    facts: dict,
    lines: Sequence[tuple[str, Sequence[str]]],
    notes: Sequence[str],
    split: Split,
    annotations: dict[int, list[int]],
) -> Evaluation:
    """Gather what the page of one row shows."""
    written_facts = {}
    for model in row.members:
        training = f"{model.label}, on {', '.join(model.trained_on)}"
        written_facts[f"checkpoint {model.name}"] = training
    for name, value in facts.items():
        written_facts[name] = "none" if value is None else str(value)
    return Evaluation(
        title=f"{row.label} on {split.name}",
        notes=notes,
        columns=COLUMNS,
        lines=lines,
        run_folders=[model.file.parent for model in row.members],
        clip_names=[clip.name for clip in split.clips],
        clip_paths=[clip.path for clip in split.clips],
        captions=split.captions,
        clip_of_caption=split.clip_of_caption,
        text=row.text,
        audio=row.audio,
        annotations=annotations,
        facts=written_facts,
    )


def as_json(facts: dict, rows: Sequence[Row]) -> dict:
    """Return what --json writes, with all figures as fractions: the facts, the rows, the groups."""
    written_rows = []
    for row in rows:
        leads = row.leads_over(rows[0])
        checkpoints = []
        for model in row.members:
            checkpoints.append(
                {"file": str(model.file), "stage": model.stage, "trained on": model.trained_on}
            )
        written_rows.append(
            {
                "name": row.name,
                "label": row.label,
                "seen": row.seen,
                "checkpoints": checkpoints,
                **figures_as_json(row.estimates),
                "lead": figures_as_json(leads),
            }
        )
    written_groups = []
    for group in group_rows(rows):
        written_groups.append(
            {
                "label": group.label,
                "rows": len(group.names),
                "names": group.names,
                "mean": by_source(group.means),
                "standard deviation": by_source(group.deviations),
            }
        )
    return {"about": facts, "rows": written_rows, "groups": written_groups}


def figures_as_json(estimates: dict[str, Estimate]) -> dict:
    """Return the values and the bounds of estimates, each by source."""
    results = {name: estimate.value for name, estimate in estimates.items()}
    intervals = {name: estimate.bounds for name, estimate in estimates.items()}
    return {"results": by_source(results), "intervals": by_source(intervals)}


def by_source(figures: dict) -> dict[str, dict]:
    """Separate the figures by the captions from those by the new annotations."""
    nested: dict[str, dict] = {}
    for name, figure in figures.items():
        source = "new annotations" if name.startswith("new ") else "captions"
        nested.setdefault(source, {})[name.removeprefix("new ")] = figure
    return nested


if __name__ == "__main__":
    run_command(main)

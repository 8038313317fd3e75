"""Checkpoint -> embeddings -> figures with confidence intervals (report, section 6 and Table 1).

    python evaluate.py --split test                           # the newest run's best.pt
    python evaluate.py --split test --checkpoint runs/NAME/best.pt --json results.json
    python evaluate.py --split test --html page.html          # to look at and listen to
    python evaluate.py --compare a.pt b.pt                    # their difference, and how sure it is
    python evaluate.py --ensemble a.pt b.pt                   # ranked by their mean similarity
    python evaluate.py --seeds 'runs/train-clotho-seed*'      # mean and deviation over runs
    python evaluate.py --dataset audiocaps                    # as in the AudioCaps literature
    python evaluate.py --submission out.csv --queries queries.csv --audio FOLDER
"""

import json
from pathlib import Path

from dualenc import InputError, replacing, run
from dualenc.checkpoints import read_model
from dualenc.evaluation import Evaluation, evaluate, joined, read_annotations
from dualenc.layouts import ANNOTATIONS, Split
from dualenc.model import DualEncoder
from dualenc.options import (
    Parser,
    add_data_options,
    add_device_options,
    add_tokenizer_option,
    check_writable,
)
from dualenc.page import runs_behind, write_evaluation
from dualenc.processes import Processes, embed_split
from dualenc.runs import best_of, newest_best
from dualenc.stages import describe, open_caches, place, precision_name
from dualenc.submission import add_challenge_options, what_is_ranked, write_submission
from dualenc.tables import (
    coverage,
    is_reports_split,
    of_comparison,
    of_one,
    of_runs,
    report_table,
)
from dualenc.training import choose_precision


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "--split", choices=("test", "val", "train"), default="test",
        help="of the data set (default test)",
    )
    parser.add_argument(
        "--dataset", default="clotho", metavar="NAME",
        help="clotho, audiocaps, or a folder with a captions.csv (default clotho)",
    )
    what = parser.add_argument_group("what is evaluated").add_mutually_exclusive_group()
    what.add_argument("--checkpoint", type=Path, help="default: the newest run's best.pt")
    what.add_argument(
        "--compare", type=Path, nargs=2, metavar=("FIRST", "SECOND"),
        help="both, and the second's lead with its interval",
    )
    what.add_argument(
        "--ensemble", type=Path, nargs="+", metavar="CHECKPOINT", help="the mean of similarities"
    )
    what.add_argument(
        "--seeds", nargs="+", metavar="RUN",
        help="runs' folders, checkpoints, or patterns of them: mean and standard deviation",
    )
    parser.add_argument(
        "--annotations", type=Path, metavar="CSV",
        help=f"the new annotations (default DATA_DIR/{ANNOTATIONS} where it is there)",
    )
    add_tokenizer_option(parser)
    parser.add_argument(
        "--allow-seen", action="store_true", help="evaluate on a split trained on, and mark it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page to look at and listen to"
    )
    add_challenge_options(parser)
    add_data_options(parser)
    add_device_options(parser)
    args = parser.parse_args()
    _check_arguments(args)
    return args


def _check_arguments(args) -> None:
    if args.html and (args.compare or args.seeds or args.queries):
        raise InputError("--html shows one --checkpoint, or an --ensemble, on a split's captions")
    if args.queries and (args.json or args.annotations):
        raise InputError("--json and --annotations are of figures, and --queries have none")
    ensemble = [path.resolve() for path in args.ensemble or []]
    if len(set(ensemble)) < len(ensemble):
        raise InputError("--ensemble: the same file is named twice")
    check_writable(args.json, args.html, args.submission)


def chosen_models(args) -> list[list[Path]]:
    """Each model that is evaluated: one checkpoint, or the members of an ensemble."""
    if args.ensemble:
        return [args.ensemble]
    if args.seeds:
        return [[path] for path in best_of(args.seeds)]
    return [[path] for path in args.compare or [args.checkpoint or newest_best()]]


def refuse_seen(models: list[list[Path]], split: Split, args) -> list[bool]:
    """Whether each model has seen the split in training; unless that is allowed, refuse it."""
    paths = [path for model in models for path in model]
    seen = {p: split.name in read_model(p, args.tokenizer).trained_on for p in paths}
    faults = [f"{path} was trained on {split.name}" for path in seen if seen[path]]
    faults = [] if args.allow_seen else faults
    if faults:
        raise InputError.of(
            "figures on what was trained on would flatter; take another --split or --dataset, or "
            "--allow-seen, which marks them", faults,
        )
    return [any(seen[path] for path in model) for model in models]


def embed(model: list[Path], split: Split, cache, queries, args, processes):
    """Clips (N, D) and queries or captions (Q, D), by a checkpoint or by an ensemble."""
    members = []
    for path in model:
        encoder = place(DualEncoder.load(path, tokenizer=args.tokenizer), args, processes)
        audio, text = embed_split(encoder, split, cache, processes, f"{path} embeds {split.name}")
        members.append((audio, encoder.embed_text(queries) if queries else text))
    return joined(members)


def present(evaluations: list[Evaluation], args) -> None:
    """Print the figures; write the same to --json, as fractions."""
    split = evaluations[0].split
    if split.missing:
        print(f"coverage    {coverage(split)}")
    if args.compare:
        text, numbers = of_comparison(*evaluations)
    elif args.seeds:
        text, numbers = of_runs(evaluations)
    else:
        text, numbers = of_one(*evaluations)
    print(text)
    if is_reports_split(split):
        print(f"\n{report_table(evaluations)}")
    if args.json:
        about = {"split": split.name, "clips": len(split.clips), "missing": len(split.missing)}
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(about | numbers, indent=1) + "\n")


def main() -> int:
    args = parse_arguments()
    models = chosen_models(args)
    processes = Processes.start(args.device)
    split, queries = what_is_ranked(args)
    path = args.annotations or args.data_dir / ANNOTATIONS
    annotations = None
    if args.annotations or (split.name == "clotho/evaluation" and path.exists() and not queries):
        annotations = read_annotations(path, split)
    seen = refuse_seen(models, split, args)
    runs = runs_behind(models[0]) if args.html else []
    (cache,) = open_caches([split], args, processes)
    embedded = [embed(model, split, cache, queries, args, processes) for model in models]
    processes.end()
    if not processes.first:
        return 0

    names = [" + ".join(map(str, model)) for model in models]
    given = args.checkpoint or args.compare or args.ensemble or args.seeds
    for name in names:
        print(f"checkpoint  {name}" + ("" if given else " (the newest run's)"))
    print(f"evaluate on {describe(split, cache)}")
    precision = precision_name(choose_precision(args.precision, processes.device))
    print(f"device      {processes.device}, towers in {precision}")
    if args.submission:
        clips = [clip.name for clip in split.clips]
        asked = queries or split.captions
        print(write_submission(args.submission, asked, clips, *embedded[0], args.top))
    if not queries:
        each = zip(names, embedded, seen, strict=True)
        evaluations = [evaluate(n, split, *both, annotations, was) for n, both, was in each]
        present(evaluations, args)
        if args.html:
            write_evaluation(args.html, evaluations[0], runs)
    return 0


if __name__ == "__main__":
    run(main)

"""Command-line options that the scripts share: their groups, ranges, and one-line errors."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from dualenc import InputError
from dualenc.config import PRESETS, TAU_BOUNDS
from dualenc.training import Options

# The tiny preset learns from scratch, so it needs a higher learning rate than fine-tuning does.
PRESET_DEFAULTS = {"report": {}, "tiny": {"max_lr": 1e-3, "min_lr": 1e-6}}


MOST_WORKERS = 256
MOST = 1e9  # of any number: what is above it is a slip, and so is infinity


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help names the defaults."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists all options)")


def number(
    kind: type, least: float, most: float = MOST, above: bool = False
) -> Callable[[str], float]:
    """An argparse type: an int or float from least (or above it) to most."""
    bounds = f"{'above' if above else 'at least'} {least:g} and at most {most:g}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (least < value if above else least <= value) or not value <= most:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bounds}")
        return value

    return parse


def check_writable(*paths: Path | None) -> None:
    """See, before long work, that files can be written, as far as that can be known.

    Raises:
        InputError: one is a folder, or there is no folder for it, and none can be made.
    """
    for path in filter(None, paths):
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a file to be written")
        there = next(parent for parent in path.absolute().parents if parent.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise InputError(f"{path}: {there} is no folder that can be written to")


def add_data_options(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir", type=Path, default=Path("data"), metavar="DIR",
        help="where CLOTHO_v2.1 and AUDIOCAPS lie (default data)",
    )
    group.add_argument(
        "--cache-dir", type=Path, metavar="DIR",
        help="where decoded audio is kept, 64 kB per second (default DATA_DIR/cache)",
    )


def add_training_data_options(parser: Parser) -> None:
    parser.add_argument(
        "--datasets", nargs="+", default=["clotho"], metavar="NAME",
        help="clotho, audiocaps, or folders with a captions.csv (default clotho)",
    )
    parser.add_argument(
        "--validation", metavar="NAME",
        help="the data set whose validation split chooses the best epoch (default clotho, or a "
        "tenth of the clips where only folders are trained on)",
    )
    add_data_options(parser)


def add_device_options(parser: Parser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device", default="auto", metavar="NAME",
        help="cpu, cuda or cuda:N (default: cuda where there is one)",
    )
    group.add_argument(
        "--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="of the two towers; losses and metrics are always fp32 (default auto: bf16 where it "
        "is fast, which is measured on a CPU, else fp16 on a GPU and fp32 on a CPU)",
    )
    group.add_argument(
        "--compile", action="store_true",
        help="compile the towers' blocks with torch.compile, in a minute: faster steps "
        "on a GPU; a CPU gains little",
    )


def add_training_options(parser: Parser, defaults: Options) -> None:
    """The options of both stages; a hyperparameter's default may depend on the preset."""
    batch = parser.add_argument_group("batches")
    add = _adder(batch, defaults)
    add("batch_size", number(int, 2), "pairs of a batch, over all processes")
    add("captions_per_clip", number(int, 1), "captions drawn together, their clip encoded once; "
        "raise --batch-size with it to keep the number of clips in a batch")
    add("micro_batch", number(int, 1), "compute a process's part of a batch in pieces of so many "
        "pairs, with the exact gradient of the whole (GradCache), for the memory of one piece and "
        "the time of one more forward; not gradient accumulation, which loses the negatives")
    schedule = parser.add_argument_group("optimiser and schedule")
    add = _adder(schedule, defaults)
    add("epochs", number(int, 1), "passes over all pairs")
    add("max_steps", number(int, 1), "end after so many steps in all, whatever --epochs says")
    add("max_lr", number(float, 0, above=True), "learning rate after the warm-up")
    add("min_lr", number(float, 0), "learning rate at the start and after the decay")
    add("warmup_epochs", number(float, 0), "epochs of linear rise")
    add("decay_epochs", number(float, 0), "epochs of cosine decay after it")
    add("weight_decay", number(float, 0), "of AdamW")
    add("seed", number(int, 0, 2**31), "of the order of pairs, crops, dropout and random weights")
    run = parser.add_argument_group("run")
    add = _adder(run, defaults)
    run.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default runs/NAME)")
    add("log_every", number(int, 1), "steps between two lines of the log")
    add("checkpoint_every", number(int, 1), "steps between two writes of last.pt within an epoch; "
        "it is written after every epoch anyway")
    add("workers", number(int, 0, MOST_WORKERS), "processes that prepare batches, for each that "
        "trains")


def _adder(group, defaults: Options) -> Callable:
    def add(name: str, kind: Callable, text: str) -> None:
        default = getattr(defaults, name)
        tiny = PRESET_DEFAULTS["tiny"].get(name)
        shown = "none" if default is None else f"{default:g}" + (f"; tiny {tiny:g}" if tiny else "")
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, metavar="N", help=f"{text} (default {shown})")

    return add


def training_options(args: argparse.Namespace, defaults: Options, preset: str) -> Options:
    """Options from what was given, then the preset's defaults, then the stage's."""
    chosen = dataclasses.asdict(defaults) | PRESET_DEFAULTS[preset]
    chosen |= {name: getattr(args, name) for name in chosen if getattr(args, name) is not None}
    options = Options(**chosen)
    if options.min_lr > options.max_lr:
        raise InputError(f"--min-lr {options.min_lr:g} is above --max-lr {options.max_lr:g}")
    if options.micro_batch and options.micro_batch > options.batch_size:
        raise InputError(
            f"--micro-batch {options.micro_batch} is more than --batch-size {options.batch_size}"
        )
    if options.captions_per_clip > options.batch_size:
        raise InputError(
            f"--captions-per-clip {options.captions_per_clip} is more than --batch-size "
            f"{options.batch_size}"
        )
    return options


def add_model_options(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--preset", choices=tuple(PRESETS), default="report",
        help="report: PaSST and RoBERTa-large; tiny: the same code with small numbers, learnt from "
        "scratch (default report)",
    )
    group.add_argument(
        "--init", metavar="WHAT",
        help="pretrained: the published weights; random; or a checkpoint "
        "(default pretrained; tiny: random)",
    )
    group.add_argument(
        "--text-model", metavar="NAME",
        help="a RoBERTa by name or local folder instead of roberta-large",
    )
    group.add_argument(
        "--text-dropout", type=number(float, 0, 0.9), metavar="P",
        help="of RoBERTa's hidden states and attention (default 0.2; tiny 0.1)",
    )
    group.add_argument(
        "--patchout", type=number(int, 0), nargs=2, metavar=("ROWS", "COLUMNS"),
        help="of PaSST's patches left out in training (default 2 of 8, 15 of 62; tiny 0 of 1, 30 "
        "of 125)",
    )
    add_tokenizer_option(group)
    add_temperature_options(group)


def add_tokenizer_option(group) -> None:
    group.add_argument(
        "--tokenizer", metavar="NAME",
        help="by name, folder or tokenizer.json, instead of a checkpoint's own; the official "
        "baseline's file holds none (default for it: roberta-large)",
    )


def given_changes(args: argparse.Namespace) -> dict:
    """What add_model_options lets one change of a preset, as far as it was given."""
    given = {"text_dropout": args.text_dropout}
    given["patchout"] = tuple(args.patchout) if args.patchout else None
    return {name: value for name, value in given.items() if value is not None}


def add_temperature_options(group) -> None:
    group.add_argument(
        "--tau", type=number(float, *TAU_BOUNDS), metavar="T",
        help="temperature of the losses (default 0.05, or the initial checkpoint's)",
    )
    group.add_argument("--learn-tau", action="store_true", help="learn it, starting from there")

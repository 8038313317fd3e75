"""What the two stages do alike: open the data, say what is about to happen, train, say the end."""

import argparse
import dataclasses
import functools
import hashlib
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dualenc import InputError
from dualenc.cache import AudioCache, open_cache
from dualenc.checkpoints import read_checkpoint, read_header
from dualenc.config import PRESETS
from dualenc.data import PairBatches
from dualenc.layouts import Split, hold_out, read_split, training_splits
from dualenc.model import DualEncoder
from dualenc.processes import Processes
from dualenc.runs import Run, check_folder, recorded_setting
from dualenc.training import SELECTION_METRIC, Options, Trainer

NAMED_DATASETS = ("clotho", "audiocaps")
PRECISIONS = (None, torch.bfloat16, torch.float16)
PRECISION_NAMES = ("fp32", "bf16", "fp16")


def read_splits(args: argparse.Namespace) -> tuple[list[Split], Split]:
    """The splits to train on, and the one to choose the best epoch by.

    That is Clotho's validation split, or, where only folders are trained on, a tenth of the first
    folder's clips; --validation names another data set.
    """
    splits = [s for name in args.datasets for s in training_splits(name, args.data_dir)]
    names = [split.name for split in splits]
    if len(set(names)) < len(names):
        raise InputError(f"--datasets {' '.join(args.datasets)}: names the same data twice")
    if args.validation is not None:
        held_out = read_split(args.validation, "val", args.data_dir)
        if held_out.name in names:
            raise InputError(f"--validation {args.validation}: {held_out.name} is trained on")
        return splits, held_out
    if any(name in NAMED_DATASETS for name in args.datasets):
        return splits, read_split("clotho", "val", args.data_dir)
    splits[0], held = hold_out(splits[0])
    return splits, held


def initial_preset(init: str, preset: str | None) -> str:
    """The preset whose training defaults suit the model: a checkpoint's own, where one is given.

    Args:
        preset: as far as one is asked for.

    Raises:
        InputError: the checkpoint is missing, or of another preset.
    """
    if init in ("pretrained", "random"):
        return preset or "report"
    if not Path(init).is_file():
        raise InputError(f"--init {init}: is neither pretrained, random, nor a checkpoint file")
    own = read_header(read_checkpoint(init), init)[0].preset
    if preset not in (None, own):
        raise InputError(f"--preset {preset}: --init {init} has the preset {own}; leave it out")
    return own


def initial_model(
    init: str, preset: str, text_model: str | None, captions: Sequence[str], seed: int,
    tokenizer: str | None = None, changes: dict | None = None,
) -> DualEncoder:
    """A new model, or a checkpoint's, in the state in which training begins.

    Args:
        changes: values of DualEncoderConfig that replace the preset's.
    """
    torch.manual_seed(seed)
    changes = changes or {}
    if init in ("pretrained", "random"):
        if tokenizer is not None:
            raise InputError("--tokenizer goes with --init CHECKPOINT; else see --text-model")
        try:
            dataclasses.replace(PRESETS[preset], **changes)
        except ValueError as error:
            raise InputError(f"--{'/--'.join(changes).replace('_', '-')}: {error}") from error
        return DualEncoder.create(preset, init, captions, text_model, **changes)
    if text_model is not None or changes:
        raise InputError(
            "--text-model, --patchout and --text-dropout go with --init pretrained or random, not "
            "with a checkpoint"
        )
    return DualEncoder.load(init, tokenizer=tokenizer)


def open_caches(
    splits: Sequence[Split], args: argparse.Namespace, processes: Processes
) -> list[AudioCache]:
    """The splits' decoded audio.

    Raises:
        InputError: a file cannot be used, or processes on several machines see different data.
    """
    folder = args.cache_dir or args.data_dir / "cache"
    caches, faults = [], []
    with processes.first_goes_first():
        for split in splits:
            try:
                caches.append(open_cache(split, folder))
            except InputError as error:  # those of the other splits are to be known, too
                faults += str(error).splitlines()
    if faults:
        raise InputError(faults[0], *(line.strip() for line in faults[1:]))
    seen = [[[clip.name, clip.captions] for clip in split.clips] for split in splits]
    if not processes.agree(seen):
        raise InputError(
            f"--data-dir {args.data_dir}: the processes see different clips or captions there; it "
            "must hold the same files on every machine"
        )
    return caches


def describe(split: Split, cache: AudioCache) -> str:
    """One line on what was found of a split."""
    line = (
        f"{split.name}: {len(split.clips):,} clips, {len(split.captions):,} captions, "
        f"{cache.seconds / 3600:.2f} h ({split.layout} layout)"
    )
    if split.missing:
        total = len(split.clips) + len(split.missing)
        line += f"; {len(split.missing):,} of {total:,} clips are not on disk"
    return line


def millions(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"


def precision_name(precision: torch.dtype | None) -> str:
    return PRECISION_NAMES[PRECISIONS.index(precision)]


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The towers' autocast type: "auto", "bf16", "fp16", or "fp32", which is None.

    auto takes bf16 where it is fast, fp16 (with a gradient scaler) on older GPUs, and float32 on
    other CPUs.
    """
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        name = "bf16" if _bf16_is_faster_here() else "fp32"
    return PRECISIONS[PRECISION_NAMES.index(name)]


@functools.cache  # one answer for all models of a process
def _bf16_is_faster_here() -> bool:
    """Measured, in some 0.1 s: CPUs with bf16 instructions may be slower with them than without.

    In processor time, so that other programs do not change the answer.
    """

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, 768, dtype=dtype), torch.ones(768, 3072, dtype=dtype)
        times = []
        for _ in range(6):
            start = time.process_time()
            a @ b
            times.append(time.process_time() - start)
        return min(times)

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def run_folder(stage: str, args: argparse.Namespace, preset: str, options: Options) -> Path:
    """Where the run is to be written; without --out the same command finds its run again.

    A run that goes on keeps its precision, unless another one than auto is asked for.

    Raises:
        InputError: it cannot be written there.
    """
    parts = [stage, *(Path(name).resolve().name for name in args.datasets)]
    parts += [preset] if preset != "report" else []
    folder = args.out or Path("runs") / "-".join([*parts, f"seed{options.seed}"])
    check_folder(folder)
    if args.precision == "auto" and recorded_setting(folder, "precision") in PRECISION_NAMES:
        args.precision = recorded_setting(folder, "precision")
    return folder


def open_run(
    folder: Path,
    stage: str,
    args: argparse.Namespace,
    model: DualEncoder,
    splits: Sequence[Split],
    options: Options,
    processes: Processes,
    **more,
) -> Run:
    """A new run, or one to be resumed; every setting becomes the first line of its log.

    Args:
        splits: trained on, and last the one that validates.
    """
    settings = {
        "stage": stage,
        "datasets": args.datasets,
        "validation": args.validation,
        "data": {s.name: [len(s.clips), len(s.captions), s.digest] for s in splits},
        "init": args.init,
        "tokenizer": hashlib.sha256(model.tokenizer.to_str().encode()).hexdigest()[:16],
        "model": dataclasses.asdict(model.config),
        "precision": precision_name(model.precision),
        **dataclasses.asdict(options),
        **more,
    }
    return Run(folder, settings, writes=processes.first)


def place(model: DualEncoder, args: argparse.Namespace, processes: Processes) -> DualEncoder:
    """Move a model to where it computes, in the precision asked for.

    "auto" may be measured; the first process's choice holds for all.

    Raises:
        InputError: --compile cannot work here.
    """
    own = PRECISIONS.index(choose_precision(args.precision, processes.device))
    model.precision = PRECISIONS[processes.highest(own if processes.first else 0)]
    model.to(processes.device)
    if args.compile:
        try:
            torch.compile(torch.square)(torch.ones(2, device=processes.device))
        except RuntimeError as error:  # no C++ compiler, no Triton, or ones that do not fit
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"--compile: cannot be done here ({reason}); leave it out") from error
        model.compile_blocks()
    return model


def announce(
    trainer: Trainer, batches: PairBatches, splits: Sequence[tuple[Split, AudioCache]]
) -> None:
    """The first lines of a run: what is about to happen. The last split validates."""
    if not trainer.processes.first:
        return
    model, options, processes = trainer.model, trainer.options, trainer.processes
    of_processes = f" in each of {processes.world} processes" if processes.world > 1 else ""
    precision = precision_name(model.precision)
    print(f"device      {processes.device}{of_processes}, towers in {precision}")
    print(
        f"model       {model.config.preset}, {millions(model)} parameters "
        f"(PaSST {millions(model.audio)}, RoBERTa {millions(model.text)})"
    )
    for role, (split, cache) in zip(
        ["train on"] * (len(splits) - 1) + ["validate on"], splits, strict=True
    ):
        print(f"{role:11} {describe(split, cache)}")
    steps = batches.steps_per_epoch * options.epochs
    print(
        f"steps       {batches.steps_per_epoch:,} an epoch, {options.epochs} epochs, {steps:,} in "
        f"all; batches of {batches.pairs_per_batch} pairs"
    )
    begun = f", going on after step {trainer.step:,}" if trainer.step else ""
    print(f"run         {trainer.run.folder}{begun}", flush=True)


def finish(trainer: Trainer, ended_by: signal.Signals | None, args: argparse.Namespace) -> int:
    """Say how a run ended and what comes next; returns the exit status."""
    trainer.processes.end()
    run = trainer.run
    if trainer.processes.first:
        if ended_by:
            print(
                f"{ended_by.name} after step {trainer.step:,}: saved in {run.last}; the same "
                "command goes on from there."
            )
        else:
            print(
                f"Done after step {trainer.step:,}. Best validation {SELECTION_METRIC} "
                f"{100 * trainer.best:.2f} %: {run.best}\n"
                f"Next: {_next_command(run.best, args)}"
            )
    return 130 if ended_by == signal.SIGINT else 0


def _next_command(checkpoint: Path, args: argparse.Namespace) -> str:
    if not any(name in NAMED_DATASETS for name in args.datasets):
        sounds = args.datasets[0]
        return f'python -m dualenc.search "..." --audio {sounds} --checkpoint {checkpoint}'
    place = f" --data-dir {args.data_dir}" if args.data_dir != Path("data") else ""
    return f"python evaluate.py --split test --checkpoint {checkpoint}{place}"

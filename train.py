"""Stage 1: contrastive training on pairs of sound and caption (report, section 2).

    python train.py --datasets clotho audiocaps    # row 3 of Table 1
    python train.py --datasets clotho              # row 1
    python train.py --datasets my_sounds/          # a folder of sounds with a captions.csv

The report's own models are rows 2 and 4 (distill.py). Rows 1 and 3, which it calls baseline models,
are the official baseline of DCASE 2025, which is trained as stage 1 is here.

The same command resumes a run that was interrupted.
"""

import contextlib
import itertools
import os
import shlex
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dualenc.checkpoints import checkpoint_file, save_atomically
from dualenc.data import PairBatches, Split, decode_splits, training_splits
from dualenc.errors import (
    InputError, Parser, not_negative_float, not_negative_int, positive_float, positive_int,
    run_command,
)
from dualenc.losses import contrastive_loss, gather
from dualenc.metrics import retrieval_metrics
from dualenc.model import PRECISIONS, PRESETS, DualEncoder, choose_device, choose_precision
from dualenc.page import write_curves
from dualenc.training import (
    RANK, WORLD, Run, StopRequest, first_process_first, join_processes, learning_rate, print_fact,
    seed_of, sum_gradients,
)

# AdamW's learning rates, (highest, lowest). The tiny preset learns from scratch, which takes higher
# rates than fine-tuning does.
LEARNING_RATES = {"report": (2e-5, 1e-7), "tiny": (1e-3, 1e-6)}
BAR = "{desc}: {percentage:3.0f}%|{bar:20}| {rate_fmt}, {remaining} left{postfix}"


# --- Options ---


def parse_arguments():
    parser = Parser(__doc__)

    model = parser.add_argument_group("model")
    model.add_argument(
        "--preset", choices=tuple(PRESETS), default="report",
        help="sizes of the model: the report's, or tiny to try things out (default report)",
    )
    model.add_argument(
        "--init",
        help="weights to start from: pretrained (default), random (default of tiny), a checkpoint, "
        "or a published one by name (salsa, or baseline: the official one of DCASE 2025)",
    )
    model.add_argument(
        "--text-model",
        help="RoBERTa to start from, a name or folder (default roberta-large); with --init random "
        "only its sizes and tokenizer are used",
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--datasets", nargs="+", default=["clotho"],
        help="data sets to train on: clotho, audiocaps, or folders with a captions.csv "
        "(default clotho)",
    )
    add_training_options(parser, data)
    return parser.parse_args()


def add_training_options(parser: Parser, data) -> None:
    """Add the options that both stages have.

    The defaults that the report leaves open are those of the official DCASE 2025 baseline.

    Args:
        data: the parser's group of options about data, to which more are added.
    """
    data.add_argument(
        "--validation",
        help="data set that chooses the best epoch (default: clotho, or a part held out of the "
        "first folder)",
    )
    data.add_argument(
        "--data-dir", type=Path, default=Path("data"),
        help="folder in which the data sets lie (default data)",
    )
    data.add_argument(
        "--cache-dir", type=Path,
        help="folder for decoded sounds, 64 kB per second of sound (default DATA_DIR/cache)",
    )
    data.add_argument(
        "--tokenizer", help="tokenizer for checkpoints that hold none, a name or folder"
    )

    batches = parser.add_argument_group("batches")
    batches.add_argument(
        "--batch-size", type=positive_int, default=64,
        help="pairs in a batch, over all processes (default 64)",
    )
    batches.add_argument(
        "--captions-per-clip", type=positive_int, default=1,
        help="captions of one clip that stand side by side in a batch and share one encoding of "
        "its sound; the number of pairs in an epoch stays the same (default 1)",
    )
    batches.add_argument(
        "--micro-batch", type=positive_int,
        help="pairs encoded at a time: less memory, more time, and still the loss of the whole "
        "batch (default: all)",
    )
    batches.add_argument(
        "--workers", type=not_negative_int, default=2,
        help="processes that prepare batches (default 2)",
    )

    schedule = parser.add_argument_group("schedule")
    schedule.add_argument(
        "--epochs", type=positive_int, default=20, help="passes over the pairs (default 20)"
    )
    schedule.add_argument(
        "--max-steps", type=positive_int,
        help="number of steps after which the run ends, if --epochs does not end it earlier",
    )
    schedule.add_argument(
        "--max-lr", type=positive_float,
        help="learning rate after the warm-up (default 2e-5; tiny: 1e-3)",
    )
    schedule.add_argument(
        "--min-lr", type=not_negative_float,
        help="learning rate at the start and after the decay (default 1e-7; tiny: 1e-6)",
    )
    schedule.add_argument(
        "--warmup-epochs", type=not_negative_float, default=1.0,
        help="epochs of linear warm-up (default 1)",
    )
    schedule.add_argument(
        "--decay-epochs", type=not_negative_float, default=15.0,
        help="epochs of cosine decay after the warm-up (default 15)",
    )
    schedule.add_argument(
        "--seed", type=not_negative_int, default=0,
        help="random seed of batch order, crops, dropout and initial weights (default 0)",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", default="auto", help="cpu, cuda or cuda:N (default: cuda where there is one)"
    )
    machine.add_argument(
        "--precision", choices=("auto", *PRECISIONS), default="auto",
        help="autocast type of both encoders (default: bf16 or fp16 on a GPU, fp32 on a CPU)",
    )

    files = parser.add_argument_group("files to write")
    files.add_argument(
        "--out", type=Path,
        help="folder of the run (default: one below runs, named by stage, data sets and seed)",
    )
    files.add_argument(
        "--log-every", type=positive_int, default=10,
        help="steps between lines of the log (default 10)",
    )
    files.add_argument(
        "--save-every", type=positive_int,
        help="steps between writes of last.pt within an epoch (default: only at an epoch's end)",
    )


# --- Stage 1 ---


def main() -> int:
    args = parse_arguments()

    # --- The device, and the other processes if torchrun started several ---
    device = choose_device(args.device)
    join_processes(device)
    print_device(device)

    # --- The data: splits to train on, and one that chooses the best epoch (section 3) ---
    splits, validation = training_splits(args.datasets, args.validation, args.data_dir)

    # --- The model: published weights, random ones, or a checkpoint (section 5) ---
    init = args.init or ("random" if args.preset == "tiny" else "pretrained")
    torch.manual_seed(args.seed)
    with first_process_first():  # Weights may have to be downloaded.
        if init in ("pretrained", "random"):
            captions = list(itertools.chain.from_iterable(split.captions for split in splits))
            model = DualEncoder.create(args.preset, init, captions, args.text_model)
        else:
            model = DualEncoder.load(checkpoint_file(init), tokenizer=args.tokenizer)
    model.to(device)
    model.stage = "contrastive"
    model.trained_on = sorted({*model.trained_on, *(split.name for split in splits)})
    model.precision = choose_precision(args.precision, device)
    print_model(model)

    # --- The batches and the run's folder: unfit options are refused before sounds are read ---
    batches = make_batches(args, splits, model)
    run = open_run(args, ["contrastive", *folder_names(args.datasets)], model, splits, validation)

    # --- The sounds: decoded once (section 4) ---
    decode(args, splits, validation)

    return train(args, run, model, batches, validation, stage_1_loss)


def stage_1_loss(audio, text, clip_ids, pair_ids, tau):
    """Compute what stage 1 minimises: L_contrastive alone (section 2)."""
    return {"loss": contrastive_loss(audio, text, clip_ids, tau)}


# --- What both stages do before the loop ---


def print_device(device: torch.device) -> None:
    if WORLD > 1:
        print_fact("device", f"{device} in each of {WORLD} processes")
    else:
        print_fact("device", device)


def print_model(model: DualEncoder) -> None:
    millions = sum(weights.numel() for weights in model.parameters()) / 1e6
    size = f"{millions:.1f} M parameters"
    print_fact("model", f"{model.config.preset}, {size}, towers in {name_of_precision(model)}")


def name_of_precision(model: DualEncoder) -> str:
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    return names[model.precision]


def folder_names(datasets: list[str]) -> list[str]:
    """Return the values of --datasets, a folder's without the path that leads to it.

    ["clotho", "recordings/my_sounds/"] -> ["clotho", "my_sounds"].
    """
    return [Path(dataset).resolve().name for dataset in datasets]


def make_batches(args, splits: list[Split], model: DualEncoder) -> PairBatches:
    """Make this process's share of all batches; an InputError if --batch-size does not fit."""
    batches = PairBatches(
        splits, model.tokenizer, args.batch_size, args.captions_per_clip, args.seed, RANK, WORLD
    )
    print_fact("steps", f"{len(batches):,} an epoch, of {args.batch_size} pairs")
    return batches


def open_run(
    args, name_parts: list[str], model: DualEncoder, splits: list[Split], validation: Split,
    **more_settings,
) -> Run:
    """Open the run's folder: --out, or one that is named by `name_parts`.

    Also sets args.out, args.max_lr and args.min_lr where they were not given.

    Args:
        more_settings: further plain values that must be the same when the run is resumed.
    """
    preset = model.config.preset
    if args.out is None:
        if preset != "report":
            name_parts = [*name_parts, preset]
        args.out = Path("runs", "-".join([*name_parts, f"seed{args.seed}"]))
    highest, lowest = LEARNING_RATES[preset]
    if args.max_lr is None:
        args.max_lr = highest
    if args.min_lr is None:
        args.min_lr = lowest
    settings = vars(args) | {
        "stage": model.stage,
        "precision": name_of_precision(model),
        "data": [split.identity for split in [*splits, validation]],
    }
    with first_process_first():
        run = Run(args.out, settings | more_settings)
    print_fact("run", run.folder)
    return run


def decode(args, splits: list[Split], validation: Split) -> None:
    """Give all splits their waveforms; the first process decodes sounds that are new or changed."""
    with first_process_first():
        decode_splits([*splits, validation], args.cache_dir or args.data_dir / "cache")
    for split in splits:
        print_fact("train on", split)
    print_fact("validate on", validation)


# --- The loop of both stages ---


def train(args, run: Run, model: DualEncoder, batches: PairBatches, validation, loss_fn) -> int:
    """Train, validate and save, and return the exit status.

    Shapes: B pairs of the whole batch, B_r of them in this process, D embedding values.

    Args:
        loss_fn: (audio (B, D), text (B, D), clip_ids (B,), pair_ids (B,), tau) -> {"loss": what is
            minimised, and its parts by name}.
    """
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.min_lr, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=model.precision == torch.float16)

    # --- Where to begin: at this run's last.pt if there is one, else with the model as given ---
    run.resume(model, optimizer, scaler)
    steps_per_epoch = len(batches)
    last_step = args.epochs * steps_per_epoch
    if args.max_steps is not None:
        last_step = min(last_step, args.max_steps)
    if run.step > 0:
        print_fact("resuming", f"{run.last_path}, after step {run.step:,} of {last_step:,}")

    # --- The loop: steps count from 0 over the whole run, across epochs ---
    progress = progress_over(args, run, batches, last_step, pin_memory=device.type == "cuda")
    stop = StopRequest()
    run.start_clock()
    for step, batch in enumerate(progress, start=run.step):
        # ---------------------------------------------------------------- one training step
        rate = learning_rate(
            step, steps_per_epoch, args.warmup_epochs, args.decay_epochs, args.max_lr, args.min_lr
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        # Dropout, patchout and the jitter of the mel filters (audio.LogMel) are seeded by the step,
        # so that a resumed run draws the same.
        torch.manual_seed(seed_of(args.seed, step, RANK))

        # Forward: encode this process's share, then gather everyone's. Every other clip of the
        # whole batch is a negative.
        audio, text = model.encode_pairs(batch, args.micro_batch)  # (B_r, D) each
        audio = gather(audio)  # (B, D)
        text = gather(text)
        clip_ids = batch.clip_ids.to(device, non_blocking=True)  # (B,)
        pair_ids = batch.pair_ids.to(device, non_blocking=True)
        losses = loss_fn(audio, text, clip_ids, pair_ids, model.tau)

        # Backward: summed over processes, the gradients are those of the whole batch.
        scaler.scale(losses["loss"]).backward()
        sum_gradients(model)

        # Update.
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # ----------------------------------------------------------------------------------

        run.finish_step(losses)  # run.step is step + 1 from here on.
        epoch = step // steps_per_epoch + 1
        steps_of_epoch = run.step - (epoch - 1) * steps_per_epoch
        epoch_ends = steps_of_epoch == steps_per_epoch
        if epoch_ends or steps_of_epoch % args.log_every == 0:
            means = run.mean_losses(args.log_every)
            pairs_per_second = round(args.batch_size * run.steps_per_second(), 3)
            run.start_clock()
            run.log(epoch=epoch, lr=rate, **means, pairs_per_second=pairs_per_second)
            progress.set_postfix(loss=f"{means['loss']:.3f}", lr=f"{rate:.1e}", refresh=False)
        if epoch_ends:
            validate(run, model, validation, epoch)
            run.start_clock()
        is_due = args.save_every is not None and steps_of_epoch % args.save_every == 0
        is_stopping = stop.requested
        if epoch_ends or is_due or is_stopping or run.step == last_step:
            run.save(model, optimizer, scaler)
        if is_stopping:
            break
        if epoch_ends and run.step < last_step:
            progress.set_description_str(f"epoch {epoch + 1}/{args.epochs}", refresh=False)
    progress.close()

    # A run that --max-steps ended within an epoch is validated, too. Its last.pt is already saved,
    # so a resumed run goes on as if there had been no such validation.
    if run.step % steps_per_epoch != 0 and not stop.requested:
        epoch = run.step // steps_per_epoch + 1
        validate(run, model, validation, epoch, is_part_of_epoch=True)

    # --- How it ended, and what comes next ---
    run.close()
    if RANK == 0 and stop.requested:
        print(f"{stop.signal.name} after step {run.step:,}: saved in {run.last_path}; the same "
              "command resumes from there.")
    elif RANK == 0:
        print(f"Done after step {run.step:,}. Best validation mAP@10 {100 * run.best:.2f} %: "
              f"{run.best_path}\nNext: {evaluation_command(args, run)}")
    return stop.exit_status


def progress_over(args, run: Run, batches: PairBatches, last_step: int, pin_memory: bool) -> tqdm:
    """Return the batches from the run's step on, prepared by workers, as a progress bar."""

    def start_worker(number: int) -> None:
        os.setpgrp()  # Ctrl-C and SIGTERM are for the main process alone.
        run.close()  # The worker has a copy of the open log, and so of its lock.

    # batches[i] is the batch of the run's step i, in any epoch; len(batches) is the number of
    # batches in one epoch.
    loader = DataLoader(
        batches, batch_size=None, sampler=range(run.step, last_step), num_workers=args.workers,
        pin_memory=pin_memory,
        # A forked worker shares the main process's memory, and starts at once.
        multiprocessing_context="fork" if args.workers > 0 else None,
        worker_init_fn=start_worker,
    )
    epoch = run.step // len(batches) + 1
    return tqdm(
        loader, desc=f"epoch {epoch}/{args.epochs}", total=last_step, initial=run.step,
        unit="pair", unit_scale=args.batch_size, bar_format=BAR, disable=RANK > 0,
        # Where the output is a file and no terminal, a line every ten seconds is enough.
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )


def validate(
    run: Run, model: DualEncoder, validation: Split, epoch: int, is_part_of_epoch: bool = False
) -> None:
    """Embed the validation split, keep the model if it is the best, log, and draw the curves.

    The first process does all this. Every process clears the epoch's losses. After a part of an
    epoch the model is kept only if no whole epoch has been validated before.
    """
    run.check_finite(model)
    losses = run.mean_losses()
    run.clear_losses()
    if RANK > 0:
        return

    sounds = tqdm(validation.waveforms, "validating", unit="clip", leave=False, disable=None)
    audio = model.embed_audio(sounds)
    text = model.embed_text(validation.captions)
    metrics = retrieval_metrics(text, audio, [[clip] for clip in validation.clip_of_caption])
    map_at_10 = metrics["mAP@10"]

    # On ties the later epoch is kept.
    is_best = map_at_10 >= run.best
    if is_part_of_epoch:
        is_best = run.best < 0
    remark = ""
    if is_best:
        remark = " (best so far)"
        run.best = map_at_10
        saved = model.checkpoint() | {"validation": metrics, "epoch": epoch}
        save_atomically(saved, run.best_path)

    run.log(epoch=epoch, **losses, validation=metrics)
    tqdm.write(
        f"epoch {epoch:2}: loss {losses['loss']:.3f}, validation mAP@10 {100 * map_at_10:.2f} %"
        f"{remark}"
    )
    with contextlib.suppress(InputError):  # The run does not depend on its picture.
        write_curves([run.folder], run.folder / "curves.svg")


def evaluation_command(args, run: Run) -> str:
    """Return a command that evaluates the run's best model, with the options that find its data."""
    command = ["python", "evaluate.py", "--checkpoint", run.best_path, "--data-dir", args.data_dir]
    if "clotho" not in args.datasets and "audiocaps" not in args.datasets:
        command += ["--dataset", args.validation or args.datasets[0], "--split", "val"]
    if args.cache_dir is not None:
        command += ["--cache-dir", args.cache_dir]
    if args.tokenizer is not None:
        command += ["--tokenizer", args.tokenizer]
    return shlex.join(str(word) for word in command)


if __name__ == "__main__":
    run_command(main, RANK)

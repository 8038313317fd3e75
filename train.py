"""Stage 1: contrastive training on pairs of sound and caption (report, section 2).

    python train.py --datasets clotho audiocaps    # row 3 of Table 1
    python train.py --datasets clotho              # row 1
    python train.py --datasets my_sounds/          # a folder of sounds with a captions.csv

The same command goes on where an earlier one was interrupted.
"""

import contextlib
import os
import shlex
import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dualenc.checkpoints import save_atomically
from dualenc.data import PairBatches, decode_splits, training_splits
from dualenc.errors import InputError, Parser, run_command
from dualenc.losses import contrastive_loss, gather
from dualenc.metrics import retrieval_metrics
from dualenc.model import PRECISIONS, PRESETS, DualEncoder, choose_device, choose_precision
from dualenc.page import write_curves
from dualenc.training import (
    RANK, WORLD, Run, first_process_first, join_processes, learning_rate, seed_of, stop_signals,
    sum_gradients,
)

# Of AdamW, (highest, lowest): to learn from scratch, as tiny does, takes more than fine-tuning.
LEARNING_RATES = {"report": (2e-5, 1e-7), "tiny": (1e-3, 1e-6)}
BAR = "{desc}: {percentage:3.0f}%|{bar:20}| {rate_fmt}, {remaining} left{postfix}"


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--datasets", nargs="+", default=["clotho"], help="clotho, audiocaps, folders of one's own")
    add("--preset", choices=tuple(PRESETS), default="report", help="report, or tiny: small numbers")
    add("--init", help="pretrained (default), random (default of tiny), or a checkpoint")
    add("--text-model", help="a RoBERTa by name or folder (default roberta-large)")
    add_training_options(parser)
    return parser.parse_args()


def add_training_options(parser: Parser) -> None:
    """The options of both stages; what the report leaves open is as in the baseline."""
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="where data sets lie (default data)")
    add("--cache-dir", type=Path, help="of decoded sounds, 64 kB a second (default DATA_DIR/cache)")
    add("--validation", help="chooses the best epoch (default clotho, or part of the first folder)")
    add("--tokenizer", help="a name or folder, in place of a checkpoint's own")
    add("--batch-size", type=int, default=64, help="pairs, over all processes (default 64)")
    add("--captions-per-clip", type=int, default=1, help="drawn together; the clip is encoded once")
    add("--micro-batch", type=int, help="pairs encoded at a time, for less memory, in more time")
    add("--epochs", type=int, default=20, help="passes over all pairs (default 20)")
    add("--max-steps", type=int, help="end after so many steps, if --epochs has not ended it")
    add("--max-lr", type=float, help="after the warm-up (default 2e-5; tiny 1e-3)")
    add("--min-lr", type=float, help="at the start, and after the decay (default 1e-7; tiny 1e-6)")
    add("--warmup-epochs", type=float, default=1, help="of linear rise (default 1)")
    add("--decay-epochs", type=float, default=15, help="of cosine decay after it (default 15)")
    add("--seed", type=int, default=0, help="of order, crops, dropout, random weights (default 0)")
    add("--out", type=Path, help="the run's folder (default runs/STAGE-DATASETS-seedN)")
    add("--log-every", type=int, default=10, help="steps between lines of the log (default 10)")
    add("--save-every", type=int, help="steps between writes of last.pt within an epoch")
    add("--workers", type=int, default=2, help="processes that prepare batches (default 2)")
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: cuda where there is one)")
    add("--precision", choices=("auto", *PRECISIONS), default="auto", help="of the towers (default:"
        " bf16 on a GPU that has it, else fp16; fp32 on a CPU)")


def main() -> int:
    args = parse_arguments()
    device = choose_device(args.device)
    join_processes(device)

    # --- What is trained on, and what chooses the best epoch (section 3) ---
    splits, held_out = training_splits(args.datasets, args.validation, args.data_dir)

    # --- The model: published weights, random ones, or a checkpoint (section 5) ---
    init = args.init or ("random" if args.preset == "tiny" else "pretrained")
    torch.manual_seed(args.seed)
    with first_process_first():  # it may download
        if init in ("pretrained", "random"):
            captions = [caption for split in splits for caption in split.captions]
            model = DualEncoder.create(args.preset, init, captions, args.text_model)
        else:
            model = DualEncoder.load(init, tokenizer=args.tokenizer)
    model.stage = "contrastive"

    # --- The run, and the loop ---
    this, batches = begin(args, model.to(device), splits, held_out)
    return train(args, this, model, batches, held_out, contrastive)


def contrastive(audio, text, clip_ids, pair_ids, tau):
    """Section 2's L_contrastive is all that stage 1 minimises."""
    return {"loss": contrastive_loss(audio, text, clip_ids, tau)}


def begin(args, model: DualEncoder, splits, held_out, **settings) -> tuple[Run, PairBatches]:
    """What both stages do before anything long: settings, folder, decoded sounds, first lines.

    The model, on its device, becomes trained on the splits; held_out chooses the best epoch.
    """
    preset = model.config.preset
    highest, lowest = LEARNING_RATES[preset]
    args.max_lr = highest if args.max_lr is None else args.max_lr
    args.min_lr = lowest if args.min_lr is None else args.min_lr
    model.trained_on = sorted({*model.trained_on, *(split.name for split in splits)})
    model.precision = choose_precision(args.precision, model.device)
    precision = next(name for name, kind in PRECISIONS.items() if kind == model.precision)
    parts = [model.stage, *(Path(dataset).resolve().name for dataset in args.datasets)]
    parts += [preset] * (preset != "report") + [f"seed{args.seed}"]
    args.out = args.out or Path("runs", "-".join(parts))
    settings |= vars(args) | {
        "stage": model.stage, "precision": precision,
        "data": [split.identity for split in [*splits, held_out]],
    }
    batches = PairBatches(
        splits, model.tokenizer, args.batch_size, args.captions_per_clip, args.seed, RANK, WORLD
    )
    with first_process_first():
        this = Run(args.out, settings)
        decode_splits([*splits, held_out], args.cache_dir or args.data_dir / "cache")
    if RANK == 0:
        size = sum(weights.numel() for weights in model.parameters()) / 1e6
        many = f" in each of {WORLD} processes" if WORLD > 1 else ""
        print(f"device      {model.device}{many}, towers in {precision}")
        print(f"model       {preset}, {size:.1f} M parameters")
        print(*(f"train on    {split}" for split in splits), f"validate on {held_out}", sep="\n")
        print(f"steps       {len(batches):,} an epoch, of {args.batch_size} pairs")
        print(f"run         {this.folder}", flush=True)
    return this, batches


def train(args, this: Run, model: DualEncoder, batches: PairBatches, held_out, loss_of) -> int:
    """The loop of both stages; returns the exit status.

    loss_of: (audio (B, D), text (B, D), clip_ids (B,), pair_ids (B,), tau) -> {"loss": what is
    minimised, and its parts by name}.
    """
    # --- Where to begin: 1. last.pt of this very run; 2. the model as it came ---
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.min_lr, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=model.precision == torch.float16)
    this.resume(model, optimizer, scaler)
    end = min(args.epochs * len(batches), args.max_steps or sys.maxsize)
    loader = iter(DataLoader(
        batches, batch_size=None, sampler=range(this.step, end), num_workers=args.workers,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if args.workers else None,
        worker_init_fn=lambda _: os.setpgrp(),  # Ctrl-C and SIGTERM are for this process alone
    ))
    bar = tqdm(
        total=end * args.batch_size, initial=this.step * args.batch_size, unit="pair",
        bar_format=BAR, disable=RANK > 0, mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    stopped = stop_signals()
    with bar:
        while True:
            # --- The end of an epoch: validate, keep the best ---
            epoch, in_epoch = -(-this.step // len(batches)), this.step % len(batches)
            if (in_epoch == 0 or this.step == end) and this.step > this.validated and not stopped:
                end_epoch(this, model, held_out, epoch, in_epoch == 0, bar)
                if in_epoch == 0:
                    this.save(model, optimizer, scaler)
            if stopped or this.step >= end:
                break
            bar.set_description_str(f"epoch {epoch + (in_epoch == 0)}/{args.epochs}", False)

            # ---------------------------------------------------------------- one training step
            batch = next(loader)
            rate = learning_rate(
                this.step, len(batches), args.warmup_epochs, args.decay_epochs,
                args.max_lr, args.min_lr,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            torch.manual_seed(seed_of(args.seed, this.step, RANK))  # dropout, patchout, jitter

            # forward: this process's share, then everyone's; every other clip is a negative
            audio, text = model.encode_pairs(batch, args.micro_batch)  # (B_r, D)
            audio, text = gather(audio), gather(text)  # (B, D)
            clip_ids = batch.clip_ids.to(device, non_blocking=True)  # (B,)
            pair_ids = batch.pair_ids.to(device, non_blocking=True)
            losses = loss_of(audio, text, clip_ids, pair_ids, model.tau)

            # backward: summed over processes, the whole batch's gradient
            scaler.scale(losses["loss"]).backward()
            sum_gradients(model)

            # update
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            # ----------------------------------------------------------------------------------
            this.add(losses)
            bar.update(args.batch_size)
            epoch, in_epoch = -(-this.step // len(batches)), this.step % len(batches)
            if in_epoch % args.log_every == 0 or this.step == end:
                means = this.mean_losses(args.log_every)
                this.log(epoch=epoch, lr=rate, **means)
                bar.set_postfix(loss=f"{means['loss']:.3f}", lr=f"{rate:.1e}", refresh=False)
            due = args.save_every and in_epoch % args.save_every == 0
            if in_epoch == 0 or due or stopped or this.step == end:
                this.save(model, optimizer, scaler)

    # --- How it ended, and what comes next ---
    if RANK == 0 and stopped:
        print(f"{signal.Signals(stopped[0]).name} after step {this.step:,}: saved in "
              f"{this.last_path}; the same command goes on from there.")
    elif RANK == 0:
        own = ["--data-dir", args.data_dir] if {"clotho", "audiocaps"} & {*args.datasets} else [
            "--dataset", args.validation or args.datasets[0], "--split", "val"]
        command = shlex.join(map(str, ["--checkpoint", this.best_path, *own]))
        print(f"Done after step {this.step:,}. Best validation mAP@10 {100 * this.best:.2f} %: "
              f"{this.best_path}\nNext: python evaluate.py {command}")
    return 130 if stopped and stopped[0] == signal.SIGINT else 0


def end_epoch(this: Run, model: DualEncoder, held_out, epoch: int, whole: bool, bar: tqdm) -> None:
    """Validate, keep the model if it is the best, log, draw: the first process does.

    A part of an epoch, which --max-steps has ended, counts only where no whole one was before.
    """
    losses = this.mean_losses()
    if RANK == 0:
        sounds = tqdm(held_out.waveforms, "validating", unit="clip", leave=False, disable=None)
        audio, text = model.embed_audio(sounds), model.embed_text(held_out.captions)
        metrics = retrieval_metrics(text, audio, [[clip] for clip in held_out.clip_of_caption])
        metric = metrics["mAP@10"]
        best = metric >= this.best if whole else this.best < 0  # of equals the later one
        if best:
            this.best = metric
            saved = model.checkpoint() | {"validation": metrics, "epoch": epoch}
            save_atomically(saved, this.best_path)
        this.log(epoch=epoch, **losses, validation=metrics)
        bar.write(f"epoch {epoch:2}: loss {losses['loss']:.3f}, validation mAP@10 "
                  f"{100 * metric:.2f} %" + " (best so far)" * best)
        with contextlib.suppress(InputError):  # the run does not depend on its picture
            write_curves([this.folder], this.folder / "curves.svg")
    this.losses, this.validated = [], this.step


if __name__ == "__main__":
    run_command(main)

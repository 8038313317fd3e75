"""Stage 2: distillation from an ensemble of stage-1 models (report, section 2).

    python distill.py --teachers runs/a/best.pt runs/b/best.pt

The teachers embed every training clip and caption once, before training. The student starts from
the first teacher and learns from both losses, on Clotho alone (section 3).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from dualenc import InputError, replacing, run
from dualenc.data import AudioCache, PairBatches
from dualenc.layouts import Split
from dualenc.losses import contrastive_loss, distillation_loss
from dualenc.model import DualEncoder, read_checkpoint
from dualenc.options import (
    Parser,
    add_data_options,
    add_device_options,
    add_temperature_options,
    add_tokenizer_option,
    add_training_options,
    number,
    training_options,
)
from dualenc.processes import Processes, embed_split, validation
from dualenc.stages import (
    announce,
    finish,
    initial_model,
    open_caches,
    open_run,
    place,
    read_splits,
)
from dualenc.training import Options, Trainer


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "--teachers", nargs="+", required=True, type=Path, metavar="CHECKPOINT",
        help="checkpoints of stage 1; they may differ in size",
    )
    parser.add_argument(
        "--datasets", nargs="+", default=["clotho"], metavar="NAME",
        help="clotho, audiocaps, or folders with a captions.csv (default clotho)",
    )
    add_data_options(parser)
    group = parser.add_argument_group("student and losses")
    group.add_argument(
        "--init", metavar="CHECKPOINT", help="where the student starts (default: first teacher)"
    )
    for name in ("contrastive", "distillation"):
        group.add_argument(
            f"--{name}-weight", type=number(float, 0), default=1.0, metavar="W",
            help=f"of the {name} loss (default 1)",
        )
    add_tokenizer_option(group)
    add_temperature_options(group)
    add_training_options(parser, Options())
    add_device_options(parser)
    args = parser.parse_args()
    _check_teachers(args.teachers)
    args.init = args.init or str(args.teachers[0])
    return args


def _check_teachers(paths: list[Path]) -> None:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError.of("--teachers: no such file", missing)
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("--teachers: the same file is named twice")


def teacher_embeddings(
    path: Path,
    train: list[tuple[Split, AudioCache]],
    folder: Path,
    args,
    processes: Processes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One teacher's embeddings of all training clips (N, D_m) and captions (P, D_m).

    They are kept in a folder beside the run, and used again where the same teacher meets the same
    clips and captions.
    """
    key = _key(path, args.tokenizer, [split for split, _ in train])
    stored = folder / f"{key}.npz"
    if processes.highest(not stored.exists()):  # all embed, or all read
        teacher = place(DualEncoder.load(path, tokenizer=args.tokenizer), args, processes)
        parts = [
            embed_split(teacher, split, cache, processes, f"{path} embeds {split.name}")
            for split, cache in train
        ]
        audio, text = (torch.cat(side) for side in zip(*parts, strict=True))
        if processes.first:
            with replacing(stored) as temporary, open(temporary, "wb") as file:
                np.savez(file, audio=audio.numpy(), text=text.numpy())
        return audio, text
    with np.load(stored, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["audio"]), torch.from_numpy(arrays["text"])


def _key(path: Path, tokenizer: str | None, splits: list[Split]) -> str:
    """Of the teacher's bytes and of the clips and captions: equal where embeddings are."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(str(tokenizer).encode())
    for split in splits:
        clips = [[clip.name, clip.captions] for clip in split.clips]
        digest.update(json.dumps([split.name, clips]).encode())
    return digest.hexdigest()[:16]


def distillation(teachers: list[tuple[torch.Tensor, torch.Tensor]], weights: tuple[float, float]):
    """Section 2's final loss: both objectives, weighted (contrastive, distillation)."""

    def loss_of(audio, text, batch, tau):
        teacher_audio = [clips[batch.clip_ids.cpu()].to(audio.device) for clips, _ in teachers]
        teacher_text = [captions[batch.pair_ids.cpu()].to(text.device) for _, captions in teachers]
        contrastive = contrastive_loss(audio, text, batch.clip_ids, tau)
        distilled = distillation_loss(audio, text, teacher_audio, teacher_text, tau)
        loss = weights[0] * contrastive + weights[1] * distilled
        return {"loss": loss, "contrastive": contrastive, "distillation": distilled}

    return loss_of


def main() -> int:
    args = parse_arguments()
    processes = Processes.start(args.device)
    splits, held_out = read_splits(args)
    with processes.first_goes_first():  # it may download
        model = initial_model(args.init, "report", None, [], args.seed or 0, args.tokenizer)
    model.set_temperature(args.tau, args.learn_tau)
    seen = {name for path in args.teachers for name in read_checkpoint(path)["trained_on"]}
    model.trained_on = sorted(seen | {*model.trained_on, *(split.name for split in splits)})
    options = training_options(args, Options(), model.config.preset)

    model = place(model, args, processes)
    weights = args.contrastive_weight, args.distillation_weight
    folder = open_run(
        "distill", args, model, splits, options, processes,
        teachers=[str(path) for path in args.teachers], loss_weights=weights,
    )
    *caches, held_out_cache = open_caches([*splits, held_out], args, processes)
    pairs = list(zip(splits, caches, strict=True))
    teachers = [
        teacher_embeddings(path, pairs, folder.folder.parent / "teachers", args, processes)
        for path in args.teachers
    ]

    batches = PairBatches(
        pairs, model.tokenizer, options.batch_size, options.captions_per_clip, options.seed,
        (processes.rank, processes.world),
    )
    trainer = Trainer(model, distillation(teachers, weights), folder, options, processes)
    announce(trainer, batches, [*pairs, (held_out, held_out_cache)])
    ended_by = trainer.fit(batches, validation(held_out, held_out_cache, processes))
    return finish(trainer, ended_by)


if __name__ == "__main__":
    run(main)

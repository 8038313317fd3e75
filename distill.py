"""Stage 2: distillation from an ensemble of stage-1 models (report, section 2).

    python distill.py --teachers runs/a/best.pt runs/b/best.pt

The teachers embed every training clip and caption once, before training. The student starts from
the first teacher and learns from both losses, on Clotho alone (section 3).
"""

import hashlib
from pathlib import Path

import torch

from dualenc import InputError, run
from dualenc.cache import AudioCache
from dualenc.checkpoints import check_tensors, read_tensors, write_tensors
from dualenc.data import PairBatches
from dualenc.layouts import Split
from dualenc.losses import contrastive_loss, distillation_loss
from dualenc.model import DualEncoder
from dualenc.options import (
    Parser,
    add_device_options,
    add_temperature_options,
    add_tokenizer_option,
    add_training_data_options,
    add_training_options,
    check_writable,
    number,
    training_options,
)
from dualenc.processes import Processes, embed_split, validation
from dualenc.stages import (
    announce,
    finish,
    initial_model,
    initial_preset,
    open_caches,
    open_run,
    place,
    precision_name,
    read_splits,
    run_folder,
)
from dualenc.training import Options, Trainer


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "--teachers", nargs="+", required=True, type=Path, metavar="CHECKPOINT",
        help="checkpoints of stage 1; they may differ in size",
    )
    add_training_data_options(parser)
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
    if args.contrastive_weight == args.distillation_weight == 0:
        raise InputError("--contrastive-weight 0 --distillation-weight 0: nothing to learn from")
    args.init = str(args.teachers[0]) if args.init is None else args.init
    if args.init in ("pretrained", "random"):
        parser.error(f"--init {args.init}: a student starts from a checkpoint")
    return args


def _check_teachers(paths: list[Path]) -> None:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError.of("--teachers: no such file", missing)
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("--teachers: the same file is named twice")


def teacher_embeddings(
    path: Path,
    stored: Path,
    train: list[tuple[Split, AudioCache]],
    args,
    processes: Processes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One teacher's embeddings of all training clips (N, D_m) and captions (P, D_m).

    Args:
        stored: where they are kept, and used again where the same teacher meets the same data.
    """
    sizes = [sum(len(split.clips) for split, _ in train), sum(len(s.captions) for s, _ in train)]
    if processes.highest(not stored.exists()):  # all embed, or all read
        teacher = place(DualEncoder.load(path, tokenizer=args.tokenizer), args, processes)
        parts = [
            embed_split(teacher, split, cache, processes, f"{path} embeds {split.name}")
            for split, cache in train
        ]
        audio, text = (torch.cat(side) for side in zip(*parts, strict=True))
        if processes.first:
            write_tensors({"audio": audio, "text": text}, stored)
        return audio, text
    return read_embeddings(stored, sizes)


def read_embeddings(stored: Path, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher's embeddings of so many clips and captions, from the file that keeps them.

    Raises:
        InputError: the file is damaged or holds something else.
    """
    embeddings = read_tensors(stored)
    check_tensors(embeddings, stored)
    try:
        audio, text = embeddings["audio"], embeddings["text"]
        right = audio.dtype == text.dtype == torch.float32 and audio.ndim == text.ndim == 2
        right = right and [len(audio), len(text)] == sizes and audio.shape[1] == text.shape[1]
        if not (right and audio.isfinite().all() and text.isfinite().all()):
            raise ValueError
    except (KeyError, ValueError) as error:
        raise InputError(f"{stored}: is damaged; remove it, and it is made anew") from error
    return audio, text


def embeddings_key(path: Path, tokenizer: str | None, splits: list[Split]) -> str:
    """Of the teacher's bytes and of the clips and captions: equal where embeddings are."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update("".join([str(tokenizer), *(split.digest for split in splits)]).encode())
    return digest.hexdigest()[:16]


def stored_name(key: str, precision: torch.dtype | None, caches: list[AudioCache]) -> str:
    """Of a file of embeddings: another one where sound files or the precision have changed."""
    sounds = hashlib.sha256("".join(cache.name for cache in caches).encode()).hexdigest()[:8]
    return f"{key}-{sounds}-{precision_name(precision)}.pt"


def distillation(teachers: list[tuple[torch.Tensor, torch.Tensor]], weights: tuple[float, float]):
    """Section 2's final loss: both objectives, weighted (contrastive, distillation)."""

    def loss_of(audio, text, clip_ids, pair_ids, tau):
        teacher_audio = [clips[clip_ids] for clips, _ in teachers]
        teacher_text = [captions[pair_ids] for _, captions in teachers]
        contrastive = contrastive_loss(audio, text, clip_ids, tau)
        distilled = distillation_loss(audio, text, teacher_audio, teacher_text, tau)
        loss = weights[0] * contrastive + weights[1] * distilled
        return {"loss": loss, "contrastive": contrastive, "distillation": distilled}

    return loss_of


def main() -> int:
    args = parse_arguments()
    preset = initial_preset(args.init, "report")
    options = training_options(args, Options(), preset)
    out = run_folder("distill", args, preset, options)
    check_writable(out.parent / "teachers" / "embeddings.pt")
    processes = Processes.start(args.device)
    splits, held_out = read_splits(args)
    # Each is loaded and let go of: what is wrong with the last is told before the first embeds.
    loaded = (DualEncoder.load(path, tokenizer=args.tokenizer) for path in args.teachers)
    seen = {name for teacher in loaded for name in teacher.trained_on}
    with processes.first_goes_first():  # it may download
        model = initial_model(args.init, "report", None, [], args.seed or 0, args.tokenizer)
    model.set_temperature(args.tau, args.learn_tau)
    model.trained_on = sorted(seen | {*model.trained_on, *(split.name for split in splits)})

    model = place(model, args, processes)
    keys = [embeddings_key(path, args.tokenizer, splits) for path in args.teachers]
    folder = open_run(
        out, "distill", args, model, [*splits, held_out], options, processes,
        teachers=[str(path) for path in args.teachers], teacher_embeddings=keys,
        contrastive_weight=args.contrastive_weight, distillation_weight=args.distillation_weight,
    )
    *caches, held_out_cache = open_caches([*splits, held_out], args, processes)
    pairs = list(zip(splits, caches, strict=True))
    batches = PairBatches(
        pairs, model.tokenizer, options.batch_size, options.captions_per_clip, options.seed,
        (processes.rank, processes.world),
    )
    teachers: list[tuple[torch.Tensor, torch.Tensor]] = []
    weights = args.contrastive_weight, args.distillation_weight
    trainer = Trainer(model, distillation(teachers, weights), folder, options, processes)
    announce(trainer, batches, [*pairs, (held_out, held_out_cache)])
    for path, key in zip(args.teachers, keys, strict=True):
        stored = out.parent / "teachers" / stored_name(key, model.precision, caches)
        embeddings = teacher_embeddings(path, stored, pairs, args, processes)
        # Beside the student, where a step looks them up: 94 MB a teacher, for Clotho.
        teachers.append(tuple(side.to(processes.device) for side in embeddings))
    ended_by = trainer.fit(batches, validation(held_out, held_out_cache, processes))
    return finish(trainer, ended_by, args)


if __name__ == "__main__":
    run(main)

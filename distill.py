"""Stage 2: distillation from an ensemble of stage-1 models (report, section 2).

    python distill.py --teachers runs/a/best.pt runs/b/best.pt

The teachers embed every training clip and caption once, before training. The student starts from
the first teacher and learns from both losses, on Clotho alone (section 3).
"""

import hashlib
import itertools
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dualenc.checkpoints import checkpoint_file, read_checkpoint, save_atomically
from dualenc.data import Split, dataset_names, training_splits
from dualenc.errors import Parser, not_negative_float, run_command
from dualenc.losses import contrastive_loss, distillation_loss
from dualenc.model import DualEncoder, choose_device, choose_precision
from dualenc.training import RANK, first_process_first, join_processes
from train import (
    add_training_options, decode, folder_names, make_batches, open_run, print_device, print_model,
    train,
)


def parse_arguments():
    parser = Parser(__doc__)

    models = parser.add_argument_group("models")
    models.add_argument(
        "--teachers", nargs="+", required=True,
        help="checkpoints, run folders, or published ones by name (baseline, DCASE 2025's official "
        "one, or salsa, that of Primus et al. 2024); their sizes may differ",
    )
    models.add_argument(
        "--init", help="checkpoint from which the student starts (default: the first teacher)"
    )

    losses = parser.add_argument_group("losses")
    losses.add_argument(
        "--contrastive-weight", type=not_negative_float, default=1.0,
        help="weight of the contrastive loss (default 1)",
    )
    losses.add_argument(
        "--distillation-weight", type=not_negative_float, default=1.0,
        help="weight of the distillation loss (default 1)",
    )

    data = parser.add_argument_group("data")
    # Section 3: stage 2 trains on Clotho alone, to match the evaluation.
    data.add_argument(
        "--datasets", nargs="+", default=["clotho"],
        help="data sets to train on (default: clotho alone)",
    )
    add_training_options(parser, data)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()

    # --- The device, and the other processes if torchrun started several ---
    device = choose_device(args.device)
    join_processes(device)
    print_device(device)

    # --- The data: splits to train on, and one that chooses the best epoch (section 3) ---
    splits, validation = training_splits(args.datasets, args.validation, args.data_dir)

    # --- The student: a copy of the first teacher, or another checkpoint ---
    with first_process_first():  # Weights may have to be downloaded.
        args.teachers = [checkpoint_file(name_or_path) for name_or_path in args.teachers]
        student_file = checkpoint_file(args.init) if args.init else args.teachers[0]
        student = DualEncoder.load(student_file, device, args.tokenizer)
    # What the teachers were trained on counts as seen by the student, so that evaluate.py refuses
    # to measure the student on it.
    seen_by_teachers = set()
    for teacher_file in args.teachers:
        seen_by_teachers.update(read_checkpoint(teacher_file)["trained_on"])
    student.stage = "distilled"
    student.trained_on = sorted(
        {*student.trained_on, *seen_by_teachers, *(split.name for split in splits)}
    )
    student.precision = choose_precision(args.precision, device)
    print_model(student)

    # --- The batches and the run's folder: unfit options are refused before sounds are read ---
    batches = make_batches(args, splits, student)
    name_parts = ["distilled", *folder_names(args.datasets)]
    name_parts += ["from", *dataset_names(seen_by_teachers)]
    digests = [digest_of_file(teacher_file) for teacher_file in args.teachers]
    run = open_run(args, name_parts, student, splits, validation, teacher_digests=digests)

    # --- The sounds: decoded once (section 4) ---
    decode(args, splits, validation)

    # --- The teachers: each embeds the training set once ---
    embeddings_of_teachers = []
    for teacher_file, digest in zip(args.teachers, digests, strict=True):
        # A file that is there was made in this run, of the same captions and in the same precision:
        # where these have changed, open_run has refused to go on, or has removed the file.
        embeddings_file = run.folder / f"teacher-{digest}.pt"
        with first_process_first():
            if not embeddings_file.exists():
                teacher = DualEncoder.load(teacher_file, device, args.tokenizer)
                teacher.precision = student.precision
                embeddings = embed_training_set(teacher, splits, f"{teacher_file} embeds")
                save_atomically(embeddings, embeddings_file)
                del teacher  # Free its memory before the next one is loaded.
        embeddings_of_teachers.append(
            torch.load(embeddings_file, map_location=device, weights_only=True)
        )

    def final_loss(audio, text, clip_ids, pair_ids, tau):
        """Compute section 2's final loss, which combines both objectives."""
        contrastive = contrastive_loss(audio, text, clip_ids, tau)
        # A clip's id is its row in a teacher's audio embeddings, a pair's id its row in the text
        # embeddings. PairBatches, which gives the ids, and embed_training_set, which makes the
        # rows, count through the same splits in the same order.
        teacher_audio = [embeddings["audio"][clip_ids] for embeddings in embeddings_of_teachers]
        teacher_text = [embeddings["text"][pair_ids] for embeddings in embeddings_of_teachers]
        distillation = distillation_loss(audio, text, teacher_audio, teacher_text, tau)
        loss = args.contrastive_weight * contrastive + args.distillation_weight * distillation
        return {"loss": loss, "contrastive": contrastive, "distillation": distillation}

    # --- The same loop with another loss ---
    return train(args, run, student, batches, validation, final_loss)


def embed_training_set(teacher: DualEncoder, splits: list[Split], label: str) -> dict[str, Tensor]:
    """Embed all N clips and all P captions of the splits, numbered as in data.PairBatches.

    A sound of more than 30 s, which only a user's folder can hold, is embedded by its first 30 s,
    whichever 30 s of it a batch shows the student.

    Returns {"audio": (N, D_m), "text": (P, D_m)}, where D_m is the teacher's width.
    """
    waveforms = itertools.chain.from_iterable(split.waveforms for split in splits)
    captions = list(itertools.chain.from_iterable(split.captions for split in splits))
    clip_count = sum(len(split.clips) for split in splits)
    progress = tqdm(waveforms, label, clip_count, leave=False, disable=None)
    return {"audio": teacher.embed_audio(progress), "text": teacher.embed_text(captions)}


def digest_of_file(path: Path) -> str:
    """Return the first 16 hexadecimal digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


if __name__ == "__main__":
    run_command(main, RANK)

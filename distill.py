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

from dualenc.checkpoints import read_checkpoint, save_atomically
from dualenc.data import Split, training_splits
from dualenc.errors import Parser, run_command
from dualenc.losses import contrastive_loss, distillation_loss
from dualenc.model import DualEncoder, choose_device
from dualenc.training import first_process_first, join_processes
from train import add_training_options, begin, train


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teachers", nargs="+", required=True, type=Path, help="checkpoints, of any size")
    add("--init", type=Path, help="a checkpoint, the student's start (default: the first teacher)")
    # Section 3: stage 2 trains on Clotho alone, to match the evaluation.
    add("--datasets", nargs="+", default=["clotho"], help="default: clotho alone")
    add("--contrastive-weight", type=float, default=1.0, help="of its loss (default 1)")
    add("--distillation-weight", type=float, default=1.0, help="of its loss (default 1)")
    add_training_options(parser)
    args = parser.parse_args()
    args.teachers = [path / "best.pt" if path.is_dir() else path for path in args.teachers]
    return args


def main() -> int:
    args = parse_arguments()
    device = choose_device(args.device)
    join_processes(device)

    # --- What is trained on, and what chooses the best epoch (section 3) ---
    splits, held_out = training_splits(args.datasets, args.validation, args.data_dir)

    # --- The student, which has seen what its teachers have ---
    seen = [name for path in args.teachers for name in read_checkpoint(path)["trained_on"]]
    digests = [digest_of_file(path) for path in args.teachers]
    with first_process_first():  # a tokenizer may be downloaded
        student = DualEncoder.load(args.init or args.teachers[0], device, args.tokenizer)
    student.trained_on, student.stage = student.trained_on + seen, "distilled"
    this, batches = begin(args, student, splits, held_out, teacher_digests=digests)

    # --- The teachers embed the training set once ---
    embedded = []
    for path, digest in zip(args.teachers, digests, strict=True):
        stored = this.folder / f"teacher-{digest}.pt"
        with first_process_first():
            if not stored.exists():
                teacher = DualEncoder.load(path, device, args.tokenizer)
                teacher.precision = student.precision
                values = embeddings(teacher, splits, f"{path} embeds")
                save_atomically(values, stored)
                del teacher  # it would stay on the GPU
        embedded.append(torch.load(stored, map_location=device, weights_only=True))

    def final_loss(audio, text, clip_ids, pair_ids, tau):
        """Section 2's final loss combines both objectives."""
        contrastive = contrastive_loss(audio, text, clip_ids, tau)
        distillation = distillation_loss(
            audio, text, [teacher["audio"][clip_ids] for teacher in embedded],
            [teacher["text"][pair_ids] for teacher in embedded], tau,
        )
        loss = args.contrastive_weight * contrastive + args.distillation_weight * distillation
        return {"loss": loss, "contrastive": contrastive, "distillation": distillation}

    # --- The same loop with another loss ---
    return train(args, this, student, batches, held_out, final_loss)


def embeddings(teacher: DualEncoder, splits: list[Split], label: str) -> dict[str, Tensor]:
    """Of all training clips (N, D_m) and captions (P, D_m)."""
    sounds = itertools.chain.from_iterable(split.waveforms for split in splits)
    captions = [caption for split in splits for caption in split.captions]
    bar = tqdm(sounds, label, sum(len(split.clips) for split in splits), leave=False, disable=None)
    return {"audio": teacher.embed_audio(bar), "text": teacher.embed_text(captions)}


def digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


if __name__ == "__main__":
    run_command(main)

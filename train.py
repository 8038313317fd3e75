"""Stage 1: contrastive training on pairs of sound and caption (report, section 2).

    python train.py --datasets clotho audiocaps    # row 3 of Table 1
    python train.py --datasets clotho              # row 1
    python train.py --datasets my_sounds/          # a folder of sounds with a captions.csv

The same command goes on where an earlier one was interrupted.
"""

from dualenc import run
from dualenc.data import PairBatches
from dualenc.losses import contrastive_loss
from dualenc.options import (
    Parser,
    add_device_options,
    add_model_options,
    add_training_data_options,
    add_training_options,
    given_changes,
    training_options,
)
from dualenc.processes import Processes, validation
from dualenc.stages import (
    announce,
    finish,
    initial_model,
    initial_preset,
    open_caches,
    open_run,
    place,
    read_splits,
    run_folder,
)
from dualenc.training import Options, Trainer


def parse_arguments():
    parser = Parser(__doc__)
    add_training_data_options(parser)
    add_model_options(parser)
    add_training_options(parser, Options())
    add_device_options(parser)
    args = parser.parse_args()
    if args.init is None:
        args.init = "random" if args.preset == "tiny" else "pretrained"
    return args


def loss_of(audio, text, clip_ids, pair_ids, tau):
    """Section 2's L_contrastive."""
    return {"loss": contrastive_loss(audio, text, clip_ids, tau)}


def main() -> int:
    args = parse_arguments()
    preset = initial_preset(args.init, args.preset)
    options = training_options(args, Options(), preset)
    out = run_folder("train", args, preset, options)
    processes = Processes.start(args.device)
    splits, held_out = read_splits(args)
    captions = [caption for split in splits for caption in split.captions]
    with processes.first_goes_first():  # it may download
        model = initial_model(
            args.init, preset, args.text_model, captions, args.seed or 0, args.tokenizer,
            given_changes(args),
        )
    model.set_temperature(args.tau, args.learn_tau)
    model.trained_on = sorted({*model.trained_on, *(split.name for split in splits)})
    model = place(model, args, processes)
    folder = open_run(out, "train", args, model, [*splits, held_out], options, processes)
    *caches, held_out_cache = open_caches([*splits, held_out], args, processes)
    pairs = list(zip(splits, caches, strict=True))
    batches = PairBatches(
        pairs, model.tokenizer, options.batch_size, options.captions_per_clip, options.seed,
        (processes.rank, processes.world),
    )
    trainer = Trainer(model, loss_of, folder, options, processes)
    announce(trainer, batches, [*pairs, (held_out, held_out_cache)])
    ended_by = trainer.fit(batches, validation(held_out, held_out_cache, processes))
    return finish(trainer, ended_by, args)


if __name__ == "__main__":
    run(main)

"""The official DCASE 2025 baseline's checkpoint, a PyTorch Lightning file, as one of ours.

Its weights have other names and stand beside hyperparameters that may hold objects of any class.
None of those classes is imported, and nothing in the file is executed.
"""

import collections
import contextlib
import os
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dualenc import InputError
from dualenc.audio import CLASSIFIER_KEYS

# Where a weight's name begins in the baseline's file, and in ours.
PREFIXES = {
    "tau": "tau",
    "audio_embedding_model.model.model.": "audio.passt.",
    "audio_projection.": "audio_projection.",
    "text_embedding_model.": "text.roberta.",
    "text_projection.": "text_projection.",
}
COMPILED = "_orig_mod."  # torch.compile puts it into the names of a module's weights
HEAD_WIDTH = 64  # of PaSST's and RoBERTa's attention, in every published size


class Inert:
    """Stands for any class that a file names: it takes whatever it is given, and does nothing.

    What comes of it is an OrderedDict, the one type that torch's restricted unpickler lets take
    both items (as subclasses of dict do) and attributes.
    """

    def __new__(cls, *args) -> collections.OrderedDict:
        return collections.OrderedDict()


@contextlib.contextmanager
def inert_classes(path: str | os.PathLike) -> Iterator[None]:
    """While open, torch.load(weights_only=True) reads every class that the file names as Inert."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(Inert, name) for name in names]):
        yield


def is_baseline(contents) -> bool:
    """Whether what a file holds has the form of the baseline's checkpoint."""
    return isinstance(contents, dict) and isinstance(contents.get("state_dict"), Mapping)


def converted(contents: dict, path: str | os.PathLike) -> dict:
    """The baseline's checkpoint -> a checkpoint of this program, without format and tokenizer.

    Raises:
        InputError: names the first weights that the baseline's model does not have, or lacks.
    """
    weights, unknown = {}, []
    for name, value in contents["state_dict"].items():
        own = own_name(name) if isinstance(name, str) else None
        if own is None or not isinstance(value, Tensor):
            unknown.append(f"has {name}, which is unknown")
        elif own.removeprefix("audio.passt.") not in CLASSIFIER_KEYS:
            weights[own] = value
    if unknown:
        raise InputError.of(f"{path}: is not the DCASE 2025 baseline's checkpoint", unknown)
    try:
        config = _sizes(weights)
    except KeyError as error:
        raise InputError(f"{path}: lacks {official_name(error.args[0])}") from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: a weight has not the baseline's shape ({error})") from error
    # The baseline divides by the absolute value of what it has learnt.
    weights["tau"] = torch.tensor(config["tau"])
    return {"config": config, "trained_on": _trained_on(contents), "model": weights}


def own_name(name: str) -> str | None:
    """A weight's name in the baseline's file -> ours; None where it has no such weight."""
    name = name.replace(COMPILED, "")
    for theirs, ours in PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


def official_name(name: str) -> str:
    """Our name of a weight -> the baseline's."""
    for theirs, ours in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _sizes(weights: dict[str, Tensor]) -> dict:
    """The configuration that the weights' shapes tell.

    Raises:
        KeyError: the name of a weight that is not there.
    """
    audio_width, _, *patch = weights["audio.passt.patch_embed.proj.weight"].shape
    vocabulary, text_width = weights["text.roberta.embeddings.word_embeddings.weight"].shape
    return {
        "audio_width": audio_width,
        "audio_depth": _depth(weights, r"audio\.passt\.blocks\.(\d+)\."),
        "audio_heads": audio_width // HEAD_WIDTH,
        "patch": tuple(patch),
        "vocabulary": vocabulary,
        "text_width": text_width,
        "text_depth": _depth(weights, r"text\.roberta\.encoder\.layer\.(\d+)\."),
        "text_heads": text_width // HEAD_WIDTH,
        "text_hidden": len(weights["text.roberta.encoder.layer.0.intermediate.dense.weight"]),
        "text_positions": len(weights["text.roberta.embeddings.position_embeddings.weight"]),
        "embedding": len(weights["audio_projection.weight"]),
        "tau": weights["tau"].abs().item(),
    }


def _depth(weights: dict[str, Tensor], layer: str) -> int:
    found = [re.match(layer, name) for name in weights]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _trained_on(contents: dict) -> list[str]:
    """The data that the weights have seen: all that the published ones have, less what is denied.

    The baseline trains on the training splits, always on Clotho's; its hyperparameters say whether
    AudioCaps and WavCaps were added.
    """
    settings = contents.get("hyper_parameters")
    settings = settings if isinstance(settings, Mapping) else {}
    added = {"audiocaps": "audiocaps/train", "wavcaps": "wavcaps/train"}
    seen = [split for name, split in added.items() if settings.get(name, True) is not False]
    return ["clotho/development", *seen]

"""Checkpoint files: plain values and tensors, read without executing anything in them.

What a file claims (names, shapes, sizes) is checked before memory is taken for it. read_model reads
what a model is made of, read_text_model what a published RoBERTa gives to one; model.py makes it.
"""

import os
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from dualenc import InputError, replacing
from dualenc.baseline import converted, inert_classes, is_baseline, official_name
from dualenc.config import DualEncoderConfig
from dualenc.text import (
    load_tokenizer,
    parse_tokenizer,
    published_roberta,
    published_roberta_config,
)

FORMAT = "dualenc 1"  # raise the number when older readers would misread a checkpoint
# What torch's restricted unpickler lets make memory out of a number, and no checkpoint holds.
ALLOCATES = re.compile(r".* (bytearray|\w*Tensor|UntypedStorage)")


def write_tensors(values: dict, path: str | os.PathLike) -> None:
    """Write plain values and tensors to a file that torch.load reads without unpickling code."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(values, file)
        except RuntimeError as error:
            # A full disk is named in the error behind torch's own.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def read_tensors(path: str | os.PathLike) -> dict:
    """What write_tensors wrote, memory-mapped: memory is taken only for what is read of it.

    Raises:
        InputError: the file is missing, damaged, or holds anything but plain values and tensors.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                raise ValueError("compressed: what it takes in memory is not known")
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    _refuse_allocations(archive.read(name))
        with inert_classes(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever its parsers meet
        raise InputError(f"{path}: is damaged or not a checkpoint; nothing was loaded") from error


def _refuse_allocations(pickled: bytes) -> None:
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL" and ALLOCATES.fullmatch(argument):
            raise ValueError(f"it holds a {argument}")


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The dictionary in a checkpoint of this program, on the CPU, without unpickling code.

    The official baseline's file is given the same form; `called` then tells its weights' names.

    Raises:
        InputError: the file is missing, damaged, of another program, or of a newer version.
    """
    checkpoint = read_tensors(path)
    if is_baseline(checkpoint):
        own = converted(checkpoint, path)
        check_tensors(own["model"], path)
        return {"format": FORMAT, "tokenizer": None, "called": official_name, **own}
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found == FORMAT:
        check_tensors(checkpoint.get("model"), path)
        return checkpoint | {"called": str}
    if isinstance(found, str) and found.startswith(FORMAT.split()[0]):
        raise InputError(f"{path}: has the format {found!r}, not {FORMAT!r}; update this program")
    raise InputError(f"{path}: is not a checkpoint of this program")


def read_header(
    checkpoint: dict, path: str | os.PathLike
) -> tuple[DualEncoderConfig, list[str]]:
    """What a checkpoint says of its model, and the splits that its weights have seen.

    Raises:
        InputError: it does not say, or no model is like that.
    """
    try:
        config = DualEncoderConfig(**checkpoint["config"])
        trained_on = list(checkpoint["trained_on"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is not a complete checkpoint ({error})") from error
    if not all(isinstance(name, str) for name in trained_on):
        raise InputError(f"{path}: is not a complete checkpoint (trained_on holds no names)")
    return config, trained_on


class Saved(NamedTuple):
    """What a checkpoint holds of a model; `called` turns our name of a weight into the file's."""

    config: DualEncoderConfig
    tokenizer: Tokenizer
    trained_on: list[str]
    weights: dict[str, Tensor]
    called: Callable[[str], str]


def read_model(path: str | os.PathLike, tokenizer: str | os.PathLike | None = None) -> Saved:
    """Read a checkpoint, memory-mapped, and hold its parts against each other.

    Args:
        tokenizer: a name, folder or tokenizer.json instead of the checkpoint's own.

    Raises:
        InputError: the file is missing, damaged or no checkpoint, or there is no such tokenizer.
    """
    checkpoint = read_checkpoint(path)
    config, trained_on = read_header(checkpoint, path)
    weights, called = checkpoint["model"], checkpoint["called"]
    try:
        # Held against the weights before memory is taken for a model of these sizes.
        if max(config.audio_depth, config.text_depth) > len(weights):
            raise ValueError("it claims more layers than it has weights")
        check_shapes(weights, config.telling_shapes(), called)
        own = _tokenizer(checkpoint["tokenizer"], tokenizer, config.vocabulary)
    except InputError:  # of another file than this one
        raise
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: is not a complete checkpoint ({error})") from error
    return Saved(config, own, trained_on, weights, called)


def _tokenizer(
    stored: str | None, other: str | os.PathLike | None, vocabulary: int
) -> Tokenizer:
    """A checkpoint's own, unless another is given; the baseline's file holds none."""
    if other is None and stored is not None:
        return parse_tokenizer(stored, vocabulary)
    other = "roberta-large" if other is None else other
    try:
        return load_tokenizer(other, vocabulary)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {other}: {error}") from error


def read_text_model(
    source: str, config: DualEncoderConfig, with_weights: bool
) -> tuple[Tokenizer, DualEncoderConfig, dict[str, Tensor] | None]:
    """A published RoBERTa's tokenizer, the configuration with its sizes, and perhaps its weights.

    Args:
        source: a name at the Hugging Face hub, or a local folder.

    Raises:
        InputError: it cannot be fetched or read, or is not one that this program computes.
    """
    try:
        config = config.with_roberta(published_roberta_config(source))
        tokenizer = load_tokenizer(source, config.vocabulary)
        weights = published_roberta(source) if with_weights else None
    except (OSError, ValueError) as error:
        raise InputError(f"--text-model {source}: {error}") from error
    return tokenizer, config, weights


def check_tensors(values, path: str | os.PathLike) -> None:
    """See that values from a file are a dictionary of plain tensors, no larger than the file.

    A tensor may be a view that repeats a few stored numbers without end.

    Raises:
        InputError: says what they are instead.
    """
    tensors = list(values.values()) if isinstance(values, dict) else [None]
    if not all(isinstance(t, Tensor) and t.layout == torch.strided for t in tensors):
        raise InputError(f"{path}: is damaged or not complete: it holds other things than tensors")
    if sum(tensor.nbytes for tensor in tensors) > Path(path).stat().st_size:
        raise InputError(f"{path}: is damaged: its tensors claim more than the file holds")


def check_shapes(
    weights: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    called: Callable[[str], str] = str,
) -> None:
    """See that weights are there, in the shapes expected.

    Args:
        called: from our name of a weight to the source's.

    Raises:
        ValueError: names the first that is not.
    """
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(f"lacks {called(name)}")
        found = tuple(weights[name].shape)
        if found != shape:
            raise ValueError(f"{called(name)} has shape {found}, not {shape}")


def load_strictly(
    module: nn.Module, weights: dict[str, Tensor], source, called: Callable[[str], str] = str
) -> None:
    """Load finite weights whose names and shapes are exactly the module's.

    Args:
        called: from the module's name of a weight to the source's.

    Raises:
        InputError: names the first few that are not.
    """
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    faults = [f"lacks {called(name)}" for name in own if name not in theirs]
    faults += [f"has {called(name)}, which is unknown" for name in theirs if name not in own]
    faults += [
        f"{called(name)} has shape {theirs[name]}, not {own[name]}"
        for name in own
        if name in theirs and own[name] != theirs[name]
    ]
    faults += [
        f"{called(name)} holds values that are not finite numbers"
        for name, value in weights.items()
        if not (value.is_floating_point() and value.isfinite().all())
    ]
    if faults:
        raise InputError.of(f"{source}: its weights do not fit", faults)
    module.load_state_dict(weights)

"""Caption -> one vector (report, sections 4 and 5): normalise, tokenise, RoBERTa's first token.

Shapes: Q captions, L tokens (at most 32), W = 1024 values (RoBERTa-large's width).
"""

import os
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, RobertaConfig, RobertaModel
from transformers.utils import logging as transformers_logging

from dualenc import InputError

MAX_TOKENS = 32  # with <s> and </s>, as section 4 truncates
PAD_ID = 1
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # RoBERTa's, in the order of their ids
_PUNCTUATION = str.maketrans("", "", string.punctuation)


# --- Caption -> tokens (section 4, "text preprocessing") ---


def normalise(caption: str) -> str:
    """Lower-cased, without ASCII punctuation."""
    return caption.lower().translate(_PUNCTUATION)


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE of RoBERTa's form on captions: the tiny preset needs no download."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(map(normalise, captions), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return _prepared(tokenizer)


def load_tokenizer(source: str | os.PathLike) -> Tokenizer:
    """A RoBERTa tokenizer: a name at the Hugging Face hub, a folder, or a tokenizer.json file."""
    if Path(source).is_file():
        try:
            return parse_tokenizer(Path(source).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise InputError(f"{source}: is not a tokenizer.json ({error})") from error
    return _prepared(_from_hub(AutoTokenizer, source).backend_tokenizer)


def parse_tokenizer(serialised: str) -> Tokenizer:
    """The tokenizer that a checkpoint holds as JSON.

    Raises:
        ValueError: the text is not a tokenizer's, or its padding token is not RoBERTa's.
    """
    try:
        tokenizer = Tokenizer.from_str(serialised)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(str(error)) from error
    return _prepared(tokenizer)


def _prepared(tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer.token_to_id("<pad>") != PAD_ID:
        raise ValueError("its <pad> has not the id 1: not a RoBERTa tokenizer")
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def tokenize(tokenizer: Tokenizer, captions: Sequence[str]) -> Tensor:
    """Captions -> (Q, L) int64, padded with 1 to the longest: the same embeddings as to 32."""
    # One by one: encode_batch would start threads, which must not be forked by data workers.
    ids = [tokenizer.encode(normalise(caption)).ids for caption in captions]
    tokens = torch.full((len(ids), max(map(len, ids), default=0)), PAD_ID)
    for row, sequence in zip(tokens, ids, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return tokens


# --- Tokens -> RoBERTa (section 5, "RoBERTa-large") ---


class TextTower(nn.Module):
    """RoBERTa (Liu et al., 2019) from transformers, without pooler."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.roberta = RobertaModel(config, add_pooling_layer=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(Q, L) int64 -> (Q, W): the first token, <s>, of the last layer."""
        mask = (tokens != PAD_ID).long()
        return self.roberta(input_ids=tokens, attention_mask=mask).last_hidden_state[:, 0]


def published_roberta_config(source: str) -> RobertaConfig:
    """The configuration of a RoBERTa by name or local folder.

    Raises:
        InputError: it cannot be fetched, or is another kind of model.
    """
    config = _from_hub(AutoConfig, source)
    if not isinstance(config, RobertaConfig) or config.model_type != "roberta":
        raise InputError(f"--text-model {source}: is a {config.model_type}, not a roberta")
    return config


def published_roberta(source: str) -> dict[str, Tensor]:
    """The weights of a RoBERTa by name or local folder, without pooler.

    Raises:
        InputError: they cannot be fetched; says the two ways out.
    """
    model, report = _from_hub(
        RobertaModel, source, add_pooling_layer=False, output_loading_info=True
    )
    if report["missing_keys"]:
        raise InputError(f"--text-model {source}: lacks {sorted(report['missing_keys'])[0]}")
    return model.state_dict()


def _from_hub(kind: type, source: str | os.PathLike, **options):
    previous = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # Code that a folder or a model at the hub brings along is neither run nor asked about.
        return kind.from_pretrained(str(source), trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"RoBERTa '{source}' cannot be fetched ({reason}): give a folder written by "
            "save_pretrained with --text-model (for a checkpoint: --tokenizer), or go on without "
            "with --preset tiny"
        ) from error
    finally:
        transformers_logging.set_verbosity(previous)
        transformers_logging.enable_progress_bar()

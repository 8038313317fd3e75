"""Caption -> one vector (report, sections 4 and 5): normalise, tokenise, RoBERTa's first token.

Shapes: Q captions, L tokens (at most 32), W = 1024 values (RoBERTa-large's width).
"""

import contextlib
import functools
import os
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import logging as hub_logging
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, RobertaConfig, RobertaModel
from transformers.utils import logging as transformers_logging

MAX_TOKENS = 32  # with <s> and </s>, as section 4 truncates
PAD_ID = 1
# What all published RoBERTas share, beside their sizes; with other values they compute otherwise.
ROBERTA = {
    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": PAD_ID,
    "is_decoder": False,
}
HUB_SECONDS = 5  # that the Hugging Face hub has to answer
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
    return _prepared(tokenizer, vocabulary)


def load_tokenizer(source: str | os.PathLike, vocabulary: int) -> Tokenizer:
    """A RoBERTa tokenizer: a name at the Hugging Face hub, a folder, or a tokenizer.json file.

    Args:
        vocabulary: how many tokens the model knows.

    Raises:
        ValueError: there is none, or it does not fit; says why.
    """
    if Path(source).is_file():
        return parse_tokenizer(Path(source).read_text(encoding="utf-8"), vocabulary)
    return _prepared(_from_hub(AutoTokenizer, "tokenizer", source).backend_tokenizer, vocabulary)


def parse_tokenizer(serialised: str, vocabulary: int) -> Tokenizer:
    """The tokenizer that a checkpoint holds as JSON.

    Raises:
        ValueError: the text is not a tokenizer's, or it does not fit the model.
    """
    try:
        tokenizer = Tokenizer.from_str(serialised)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"is not a tokenizer: {error}") from error
    return _prepared(tokenizer, vocabulary)


def _prepared(tokenizer: Tokenizer, vocabulary: int) -> Tokenizer:
    if tokenizer.token_to_id("<pad>") != PAD_ID:
        raise ValueError("its tokenizer is missing or not RoBERTa's: <pad> has not the id 1")
    if max(tokenizer.get_vocab().values()) >= vocabulary:
        raise ValueError(f"its tokenizer has more than {vocabulary} tokens")
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
        ValueError: there is none, or it is of another kind of model.
    """
    config = _from_hub(AutoConfig, "configuration", source)
    if not isinstance(config, RobertaConfig) or config.model_type != "roberta":
        raise ValueError(f"is a {config.model_type}, not a roberta")
    for name, value in ROBERTA.items():
        found = getattr(config, name)
        if found != value:
            raise ValueError(f"its {name} is {found}, and only {value} is computed here")
    return config


def published_roberta(source: str) -> dict[str, Tensor]:
    """The weights of a RoBERTa by name or local folder, without pooler.

    Raises:
        ValueError: there are none, or they are not those that its configuration speaks of.
    """
    model, report = _from_hub(
        RobertaModel, "weights", source, add_pooling_layer=False, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    others = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if others:
        raise ValueError(f"its weights lack {others[0]}, or have it in another size")
    return model.state_dict()


def _from_hub(kind: type, what: str, source: str | os.PathLike, **options):
    """What is in a local folder, or at the hub under a name; `what` is its name in errors.

    Raises:
        ValueError: says in one line why it cannot be read or fetched; of the latter the ways out.
    """
    local = Path(source).exists()
    with _silence():
        try:
            # Code that a folder or a model at the hub brings along is neither run nor asked about.
            return kind.from_pretrained(
                str(source), trust_remote_code=False,
                local_files_only=local or not _hub_answers(), **options,
            )
        except Exception as error:  # transformers raises whatever its parsers meet
            reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(":.")
            if local:
                raise ValueError(f"its {what} cannot be read ({reason})") from error
            raise ValueError(
                f"cannot be fetched ({reason}): give a folder written by save_pretrained, or go on "
                "without with --preset tiny"
            ) from error


@functools.cache
def _hub_answers() -> bool:
    """Whether the hub can be reached; else its cache must do.

    Its own client asks for a minute, of every file, before it gives up.
    """
    try:
        get_hf_file_metadata(hf_hub_url("roberta-large", "config.json"), timeout=HUB_SECONDS)
    except HfHubHTTPError:
        pass  # an answer, too
    except Exception:  # no name server, no route, a proxy, offline mode: each has its own
        return False
    return True


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No warnings and bars of the libraries: what is wrong is said in our own words."""
    levels = {log: log.get_verbosity() for log in (transformers_logging, hub_logging)}
    for log in levels:
        log.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in levels.items():
            log.set_verbosity(level)
        transformers_logging.enable_progress_bar()

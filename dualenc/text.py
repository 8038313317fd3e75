"""Caption -> tokens -> RoBERTa's first token (report, sections 4 and 5).

The report calls RoBERTa's tokenizer WordPiece; it is a byte-level BPE, which is used here.

Q captions, L tokens in the longest of them (at most 32), W = 1024, RoBERTa-large's width.
"""

import functools
import os
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers  # It puts off importing RobertaModel, which takes seconds, to its first use.
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from torch import Tensor, nn
from transformers.utils import logging

from dualenc.errors import InputError, first_line

MAX_TOKENS = 32  # tokens, <s> and </s> included (section 4)
PAD_ID = 1
ROBERTA = "roberta-large"  # its name at the Hugging Face hub
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # RoBERTa's, in the order of their ids


# --- Caption -> tokens (section 4, "text preprocessing") ---

def normalise(caption: str) -> str:
    """Return a caption in lower case and without ASCII punctuation."""
    return caption.lower().translate(str.maketrans("", "", string.punctuation))


def tokenize(tokenizer: Tokenizer, captions: Sequence[str]) -> Tensor:
    """Turn captions into tokens (Q, L) int64, padded with 1 to the longest of them.

    The report pads to 32 tokens, which would give the same embeddings.
    """
    # Captions are encoded one by one, since encode_batch would start threads, and threads do not
    # survive the fork into data workers.
    ids = [torch.tensor(tokenizer.encode(normalise(caption)).ids) for caption in captions]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD_ID)


def train_bpe(captions: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE of RoBERTa's form, so that the tiny preset needs no download."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        map(normalise, captions), vocabulary, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return set_truncation(tokenizer, "the captions")


def load_tokenizer(source: str | os.PathLike) -> Tokenizer:
    """Load a RoBERTa tokenizer by its name at the Hugging Face hub, or from a folder.

    Raises:
        InputError: it cannot be read or fetched, or is another model's.
    """
    remedy = "with --tokenizer, name a folder that save_pretrained wrote"
    tokenizer = _from_pretrained(transformers.AutoTokenizer, source, remedy)
    return set_truncation(tokenizer.backend_tokenizer, source)


def set_truncation(tokenizer: Tokenizer, source: str | os.PathLike) -> Tokenizer:
    """Set a tokenizer to truncate and not to pad; an InputError if it is not RoBERTa's."""
    if tokenizer.token_to_id("<pad>") != PAD_ID:
        raise InputError(f"{source}: its tokenizer is not RoBERTa's: <pad> has not the id {PAD_ID}")
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


# --- Tokens -> RoBERTa (section 5, "RoBERTa-large") ---

class TextTower(nn.Module):
    """RoBERTa (Liu et al., 2019) from transformers, without pooler."""

    def __init__(self, config: transformers.RobertaConfig):
        super().__init__()
        self.roberta = transformers.RobertaModel(config, add_pooling_layer=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode tokens as the last layer's <s>, section 5's "[CLS]": (Q, L) int64 -> (Q, W)."""
        # The mask is 4-D, since transformers reads a 2-D one's values, which forces a GPU sync.
        mask = (tokens != PAD_ID)[:, None, None]  # (Q, 1, 1, L)
        return self.roberta(input_ids=tokens, attention_mask=mask).last_hidden_state[:, 0]


def published_roberta(source: str) -> "transformers.RobertaModel":
    """Load a RoBERTa without pooler by its name at the hub, or from a save_pretrained folder.

    Raises:
        InputError: it cannot be read or fetched, or is another model.
    """
    remedy = (
        "with --text-model, name a folder that save_pretrained wrote, or take --preset tiny, which "
        "needs none"
    )
    options = dict(add_pooling_layer=False, output_loading_info=True)
    model, info = _from_pretrained(transformers.RobertaModel, source, remedy, **options)
    if info["missing_keys"]:  # transformers would only draw random weights for them.
        raise InputError(f"{source}: is no RoBERTa: lacks {min(info['missing_keys'])}")
    return model


def _from_pretrained(loader: type, source: str | os.PathLike, remedy: str, **options):
    """Load with transformers from a folder, or fetch by a name; an InputError if neither can be."""
    local = Path(source).exists()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        cached_only = local or not _hub_answers()
        return loader.from_pretrained(str(source), local_files_only=cached_only, **options)
    except Exception as error:  # transformers passes on whatever its parsers raise.
        reason = first_line(error).rstrip(":.")
        action = "read as a RoBERTa" if local else "fetched from the Hugging Face hub"
        raise InputError(
            f"{source}: cannot be {action} ({reason}): {remedy}"
        ) from error


@functools.cache
def _hub_answers() -> bool:
    """Tell whether the Hugging Face hub can be reached.

    Where it cannot, transformers retries for 47 s before it gives up a tokenizer, and for 23 s
    before it gives up a model.
    """
    try:
        get_hf_file_metadata(hf_hub_url(ROBERTA, "config.json"), timeout=5)  # s
    except Exception as error:  # A missing network, a proxy and offline mode raise one each.
        return isinstance(error, HfHubHTTPError)  # An error page is an answer, too.
    return True

"""The plain recipe, as a reference for the benchmarks: the same mathematics, nothing saved.

Written from the official baseline's description, with hear21passt and transformers as they come:
every clip is padded to 30 s and three segments are computed, every caption is padded to 32 tokens,
PaSST's attention is written out, its mel filters are computed anew at every call.
"""

import contextlib
import io
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from hear21passt.models.passt import get_model
from hear21passt.models.preprocess import AugmentMelSTFT
from torch import Tensor, nn
from transformers import RobertaModel

from dualenc.audio import CLIP_SAMPLES, INT16_SCALE, PASST_NAME, SEGMENT_SAMPLES, segment_count
from dualenc.model import DualEncoder
from dualenc.text import MAX_TOKENS, PAD_ID, tokenize

warnings.filterwarnings("ignore", module="hear21passt|torch.functional")


def share_weights(module: nn.Module, source: nn.Module) -> None:
    """Give a module the parameters of the same names in another; PaSST's heads stay."""
    for name, parameter in source.named_parameters():
        owner, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(owner), own_name, parameter)


class PlainRecipe(nn.Module):
    """A dual encoder that shares the weights of one of ours, so that both fit into memory."""

    def __init__(self, ours: DualEncoder):
        super().__init__()
        self.tokenizer = ours.tokenizer
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the whole network
            self.mel = AugmentMelSTFT(
                n_mels=128, sr=32_000, win_length=800, hopsize=320, n_fft=1024, freqm=0, timem=0,
                fmin=0.0, fmax=None, fmin_aug_range=10, fmax_aug_range=2000,
            )
            self.passt = get_model(
                PASST_NAME, pretrained=False, fstride=16, tstride=16, input_tdim=1000,
                s_patchout_t=15, s_patchout_f=2,
            )
        self.roberta = RobertaModel(ours.text.roberta.config, add_pooling_layer=False)
        share_weights(self.passt, ours.audio.passt)
        share_weights(self.roberta, ours.text.roberta)
        self.audio_projection, self.text_projection = ours.audio_projection, ours.text_projection
        self.to(ours.device)

    def encode_audio(self, clips: list[np.ndarray]) -> Tensor:
        """(n,) int16 each -> (C, 1024)."""
        padded = np.zeros((len(clips), CLIP_SAMPLES), np.float32)
        for row, clip in zip(padded, clips, strict=True):
            row[: len(clip)] = clip[:CLIP_SAMPLES] / np.float32(INT16_SCALE)
        device = self.audio_projection.weight.device
        segments = torch.from_numpy(padded).to(device).view(-1, SEGMENT_SAMPLES)
        features = self.passt(self.mel(segments).unsqueeze(1))[1].view(len(clips), 3, -1)
        counts = [min(3, segment_count(len(clip))) for clip in clips]
        means = [f[:count].mean(0) for f, count in zip(features, counts, strict=True)]
        return F.normalize(self.audio_projection(torch.stack(means)), dim=1)

    def encode_text(self, captions: list[str]) -> Tensor:
        """Q captions -> (Q, 1024)."""
        tokens = tokenize(self.tokenizer, captions)
        tokens = F.pad(tokens, (0, MAX_TOKENS - tokens.shape[1]), value=PAD_ID)
        tokens = tokens.to(self.text_projection.weight.device)
        first = self.roberta(tokens, (tokens != PAD_ID).long()).last_hidden_state[:, 0]
        return F.normalize(self.text_projection(first), dim=1)

"""The plain recipe, as a reference for the benchmarks: the same mathematics, nothing saved.

As in the official baseline, with hear21passt and transformers as they come: clips are padded to
30 s and captions to 32 tokens, PaSST writes attention out and computes mel filters at every call.
"""

import contextlib
import io
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from hear21passt.models.passt import get_model
from hear21passt.models.preprocess import AugmentMelSTFT
from torch import nn
from transformers import RobertaModel

from dualenc.audio import CLIP_SAMPLES, SEGMENT_SAMPLES, to_segments
from dualenc.decoding import INT16_SCALE
from dualenc.model import DualEncoder
from dualenc.text import MAX_TOKENS, PAD_ID, tokenize

warnings.filterwarnings("ignore", module="hear21passt|torch.functional")


class PlainRecipe(nn.Module):
    """A dual encoder that shares the weights of one of ours, so that both fit into memory."""

    def __init__(self, ours: DualEncoder):
        super().__init__()
        self.ours = ours
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the whole network
            self.mel = AugmentMelSTFT(
                n_mels=128, sr=32_000, win_length=800, hopsize=320, n_fft=1024, freqm=0, timem=0,
                fmin=0.0, fmax=None, fmin_aug_range=10, fmax_aug_range=2000,
            )
            self.passt = get_model(
                "passt_s_p16_s16_128_ap468", pretrained=False, fstride=16, tstride=16,
                input_tdim=1000, s_patchout_t=15, s_patchout_f=2,
            )
        self.roberta = RobertaModel(ours.text.roberta.config, add_pooling_layer=False)
        for module, source in (self.passt, ours.audio.passt), (self.roberta, ours.text.roberta):
            for name, parameter in source.named_parameters():
                owner, _, own_name = name.rpartition(".")
                setattr(module.get_submodule(owner), own_name, parameter)
        self.to(ours.device)

    def forward(self, clips: list[np.ndarray], captions: list[str], precision=None):
        """B clips (n,) int16 and their captions -> audio and text embeddings (B, 1024)."""
        padded = np.stack([np.pad(clip, (0, CLIP_SAMPLES - len(clip))) for clip in clips])
        segments, ours = torch.from_numpy(padded).view(-1, SEGMENT_SAMPLES), self.ours
        segments = segments.to(ours.device) / INT16_SCALE
        tokens = tokenize(ours.tokenizer, captions)
        tokens = F.pad(tokens, (0, MAX_TOKENS - tokens.shape[1]), value=PAD_ID).to(ours.device)
        with torch.autocast(ours.device.type, precision, enabled=precision is not None):
            features = self.passt(self.mel(segments).unsqueeze(1))[1].view(len(clips), 3, -1)
            counts = to_segments(clips)[1].tolist()
            means = [f[:count].mean(0) for f, count in zip(features, counts, strict=True)]
            first = self.roberta(tokens, (tokens != PAD_ID).long()).last_hidden_state[:, 0]
            ends = ours.audio_projection(torch.stack(means)), ours.text_projection(first)
        return tuple(F.normalize(end.float(), dim=1) for end in ends)

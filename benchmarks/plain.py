"""The plain recipe, as a reference for the benchmarks: the same mathematics, nothing saved.

It is put together as the official baseline is, with hear21passt and transformers as they come:
clips are padded to 30 s and captions to 32 tokens, PaSST writes attention out, and the mel filters
are computed at every call.

B pairs, D = 1024 values of an embedding, n samples at 32 kHz.
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

from dualenc.audio import CLIP_SAMPLES, MAX_SEGMENTS, SEGMENT_SAMPLES, to_segments
from dualenc.decoding import INT16_SCALE
from dualenc.model import DualEncoder
from dualenc.text import MAX_TOKENS, PAD_ID, tokenize

warnings.filterwarnings("ignore", module="hear21passt|torch.functional")
# Otherwise a GPU would compute the plain recipe's convolutions in TF32, and not in fp32.
torch.backends.cudnn.allow_tf32 = False


class PlainRecipe(nn.Module):
    """A dual encoder that shares the weights of one of ours, so that both fit into memory."""

    def __init__(self, ours: DualEncoder):
        super().__init__()
        self.ours = ours
        with contextlib.redirect_stdout(io.StringIO()):  # hear21passt prints the whole network
            self.mel = AugmentMelSTFT(
                n_mels=128, sr=32_000, win_length=800, hopsize=320, n_fft=1024, freqm=0, timem=0,
                fmin=0.0, fmax=None, fmin_aug_range=10, fmax_aug_range=2000,
            )
            self.passt = get_model(
                "passt_s_p16_s16_128_ap468", pretrained=False, fstride=16, tstride=16,
                input_tdim=1000, s_patchout_t=15, s_patchout_f=2,
            )
        self.roberta = RobertaModel(ours.text.roberta.config, add_pooling_layer=False)
        share_weights(ours.audio.passt, self.passt)
        share_weights(ours.text.roberta, self.roberta)
        self.to(ours.device)

    def forward(
        self, clips: list[np.ndarray], captions: list[str], precision: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed B clips (n,) int16 and their captions: audio and text, (B, D) each."""
        padded = [np.pad(clip, (0, CLIP_SAMPLES - len(clip))) for clip in clips]
        segments = torch.from_numpy(np.stack(padded)).view(-1, SEGMENT_SAMPLES)
        segments = segments.to(self.ours.device) / INT16_SCALE
        counts = to_segments(clips)[1].tolist()

        tokens = tokenize(self.ours.tokenizer, captions)
        tokens = F.pad(tokens, (0, MAX_TOKENS - tokens.shape[1]), value=PAD_ID)
        tokens = tokens.to(self.ours.device)

        with torch.autocast(self.ours.device.type, precision, enabled=precision is not None):
            _, features = self.passt(self.mel(segments).unsqueeze(1))
            features = features.view(len(clips), MAX_SEGMENTS, -1)
            means = [clip[:count].mean(0) for clip, count in zip(features, counts, strict=True)]
            first_tokens = self.roberta(tokens, (tokens != PAD_ID).long()).last_hidden_state[:, 0]
            audio = self.ours.audio_projection(torch.stack(means))
            text = self.ours.text_projection(first_tokens)
        return F.normalize(audio.float(), dim=1), F.normalize(text.float(), dim=1)


def share_weights(source: nn.Module, target: nn.Module) -> None:
    """Make each parameter of `source` that of `target`, too."""
    for name, parameter in source.named_parameters():
        owner, _, name_there = name.rpartition(".")
        setattr(target.get_submodule(owner), name_there, parameter)

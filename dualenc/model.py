"""The dual encoder (report, sections 2 and 5): two towers, two linear heads, one temperature.

    sound   -> 10 s segments -> PaSST -> linear -> mean over the clip's segments -> unit norm
    caption -> tokens        -> RoBERTa's <s>   -> linear                        -> unit norm

C clips, S segments of all of them, Q captions, L tokens, B pairs, D = 1024 values, n samples.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import RobertaConfig

from dualenc.audio import CLIP_SAMPLES, AudioTower, crop, to_segments
from dualenc.checkpoints import load_strictly, published_passt, read_checkpoint
from dualenc.decoding import (
    INT16_SCALE, SAMPLE_RATE, AnyPath, load_audio, resample, to_int16,
)
from dualenc.errors import InputError
from dualenc.text import (
    PAD_ID, ROBERTA, TextTower, load_tokenizer, published_roberta, set_truncation, tokenize,
    train_bpe,
)

EMBED_CLIPS, EMBED_CAPTIONS = 8, 64  # at a time, without gradients
Sound = str | os.PathLike | np.ndarray | Tensor  # a path, or a waveform


# --- Every size of the model; the presets ---

@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
    """The defaults are the report's. Stored in the checkpoint."""

    preset: str = "report"  # whose training defaults suit the model
    # PaSST, passt_s_p16_s16_128_ap468: 8 x 62 patches of a 10 s segment
    audio_width: int = 768
    audio_depth: int = 12
    audio_heads: int = 12
    patch: tuple[int, int] = (16, 16)  # mel bands, 10 ms frames
    patchout: tuple[int, int] = (2, 15)  # rows, columns of patches left out in training
    # RoBERTa-large
    vocab_size: int = 50_265
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    max_position_embeddings: int = 514
    text_dropout: float = 0.2  # of hidden states and attention, as in the baseline
    # the shared space
    embedding: int = 1024
    tau: float = 0.05


ROBERTA_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                 "intermediate_size", "max_position_embeddings")  # by transformers' names
PRESETS = {
    "report": DualEncoderConfig(),
    # The same code in small. On a CPU the gradient of patches under 15 frames wide is slow.
    "tiny": DualEncoderConfig(
        preset="tiny", audio_width=96, audio_depth=2, audio_heads=3, patch=(128, 16),
        patchout=(0, 15), vocab_size=1000, hidden_size=96, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=384, max_position_embeddings=66, text_dropout=0.1,
    ),
}


# --- The model (sections 2 and 5) ---

class DualEncoder(nn.Module):
    """Embeds sounds and sentences in one space, where their cosine says how well they match."""

    def __init__(self, config: DualEncoderConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.trained_on: list[str] = []  # "dataset/split": what the weights, or teachers, have seen
        self.stage = "contrastive"  # or "distilled"
        self.precision: torch.dtype | None = None  # the towers' autocast type; None is float32
        sizes = config.audio_width, config.audio_depth, config.audio_heads
        self.audio = AudioTower(*sizes, config.patch, config.patchout)
        self.text = TextTower(RobertaConfig(
            **{name: getattr(config, name) for name in ROBERTA_SIZES}, pad_token_id=PAD_ID,
            hidden_dropout_prob=config.text_dropout, layer_norm_eps=1e-5, type_vocab_size=1,
            attention_probs_dropout_prob=config.text_dropout,
        ))
        self.audio_projection = nn.Linear(config.audio_width, config.embedding)
        self.text_projection = nn.Linear(config.hidden_size, config.embedding)
        self.register_buffer("tau", torch.tensor(config.tau))  # fixed, of both losses

    def project_segments(self, segments: Tensor) -> Tensor:
        """(S, 320000) int16 or float -> (S, D), not normalised."""
        with self._autocast():
            features = self.audio(segments)
        return self.audio_projection(features.float())

    def encode_audio(self, segments: Tensor, counts: Tensor) -> Tensor:
        """(S, 320000), (C,) segments of each clip, summing to S -> (C, D) unit norm."""
        # The baseline averages before the linear head; a mean passes through it unchanged. Unsafe:
        # that counts sum to S is not checked, for which a GPU would be waited for.
        vectors = self.project_segments(segments)
        means = torch.segment_reduce(vectors, "mean", lengths=counts, unsafe=True)
        return F.normalize(means, dim=1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(Q, L) int64 -> (Q, D) unit norm."""
        with self._autocast():
            features = self.text(tokens)
        return F.normalize(self.text_projection(features.float()), dim=1)

    def encode_pairs(self, batch, micro_batch: int | None = None) -> tuple[Tensor, Tensor]:
        """The audio and the text embeddings (B, D) of the pairs of a data.Batch.

        With micro_batch, so many pairs at a time: what backward needs of a piece is computed again,
        with the same random numbers, when backward reaches it. Memory is that of one piece, and
        every pair still meets all negatives of the batch (GradCache, Gao et al. 2021).
        """

        def encode(segments, counts, clip_rows, tokens) -> tuple[Tensor, Tensor]:
            return self.encode_audio(segments, counts)[clip_rows], self.encode_text(tokens)

        if micro_batch is None:
            return encode(*batch.inputs(self.device))
        # Tensors as arguments: among them checkpoint looks for the device whose random state it
        # keeps. The batch is cut on the CPU: to cut it on a GPU would be to wait for that.
        pieces = [
            checkpoint(encode, *piece.inputs(self.device), use_reentrant=False)
            for piece in batch.pieces(micro_batch)
        ]
        audio, text = zip(*pieces, strict=True)
        return torch.cat(audio), torch.cat(text)

    def _autocast(self) -> torch.autocast:
        enabled = self.precision is not None
        return torch.autocast(self.device.type, dtype=self.precision, enabled=enabled)

    @property
    def device(self) -> torch.device:
        return self.tau.device

    # --- The two directions, for users: float32, on the CPU, unit norm ---

    @torch.inference_mode()
    def embed_audio(self, sounds: Sound | Iterable[Sound], rate: int = SAMPLE_RATE) -> Tensor:
        """Embed sounds, of each its first 30 s: (N, D).

        Args:
            sounds: paths, or mono waveforms (n,), float in -1..1 or int16; one alone counts as a
                list of one. Taken one by one, so that a generator (or a progress bar) will do.
            rate: of waveforms, in Hz. A file that cannot be read is an InputError.
        """
        if isinstance(sounds, Sound):
            sounds = [sounds]
        waveforms, parts = (_waveform(sound, rate) for sound in sounds), []
        self.eval()  # no dropout, patchout or jitter
        while batch := list(itertools.islice(waveforms, EMBED_CLIPS)):
            segments, counts = (tensor.to(self.device) for tensor in to_segments(batch))
            parts.append(self.encode_audio(segments, counts).cpu())
        return torch.cat([torch.zeros(0, self.config.embedding), *parts])

    @torch.inference_mode()
    def embed_text(self, captions: str | Iterable[str]) -> Tensor:
        """Embed captions, or one: (Q, D)."""
        self.eval()
        captions = [captions] if isinstance(captions, str) else list(captions)
        embeddings = torch.zeros(len(captions), self.config.embedding)
        # Neighbours of like length need little padding.
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        for start in range(0, len(order), EMBED_CAPTIONS):
            rows = order[start : start + EMBED_CAPTIONS]
            tokens = tokenize(self.tokenizer, [captions[i] for i in rows])
            embeddings[rows] = self.encode_text(tokens.to(self.device)).cpu()
        return embeddings

    # --- Making, saving, loading ---

    @classmethod
    def create(
        cls, preset: str, init: str, captions: Sequence[str], text_model: str | None = None
    ) -> "DualEncoder":
        """A new model of the preset "report" or "tiny", with "pretrained" or "random" weights.

        Of the captions a tokenizer is made where no published one is used. text_model is a
        RoBERTa's name or folder in place of roberta-large; its sizes are used.
        """
        config, pretrained = PRESETS[preset], init == "pretrained"
        passt = published_passt() if pretrained else None
        text_model = text_model or (ROBERTA if pretrained else None)
        if text_model:
            roberta, tokenizer = published_roberta(text_model), load_tokenizer(text_model)
            sizes = {name: getattr(roberta.config, name) for name in ROBERTA_SIZES}
            config = dataclasses.replace(config, **sizes)
        else:
            tokenizer = train_bpe(captions, config.vocab_size)
        model = cls(config, tokenizer)
        _scale_to_width(model.audio, PRESETS["report"].audio_width / config.audio_width)
        _scale_to_width(model.text, PRESETS["report"].hidden_size / config.hidden_size)
        if pretrained:
            load_strictly(model.audio.passt, passt, "the published PaSST")
            load_strictly(model.text.roberta, roberta.state_dict(), text_model)
        return model

    def checkpoint(self) -> dict:
        """What load() reads when torch.save has written it: plain values and tensors."""
        return {
            "config": dataclasses.asdict(self.config), "tokenizer": self.tokenizer.to_str(),
            "trained_on": self.trained_on, "stage": self.stage, "model": self.state_dict(),
        }

    @classmethod
    def load(
        cls, path: AnyPath, device: str | torch.device = "cpu", tokenizer: AnyPath | None = None
    ) -> "DualEncoder":
        """Load best.pt or last.pt of a run, a run's folder, or the DCASE 2025 baseline's .ckpt.

        A tokenizer, by name or folder, takes the place of the checkpoint's own; the baseline's file
        holds none, and roberta-large's is taken.
        """
        saved = read_checkpoint(path)
        if tokenizer or saved["tokenizer"] is None:
            tokenizer = load_tokenizer(tokenizer or ROBERTA)
        else:
            tokenizer = set_truncation(Tokenizer.from_str(saved["tokenizer"]))
        try:
            model = cls(DualEncoderConfig(**saved["config"]), tokenizer)
        except TypeError as error:
            raise InputError(f"{path}: is damaged or of another version ({error})") from error
        load_strictly(model, saved["model"], path)
        model.trained_on, model.stage = saved["trained_on"], saved["stage"]
        return model.to(device).eval()


@torch.no_grad()
def _scale_to_width(tower: nn.Module, ratio: float) -> None:
    """Scale random matrices by the root of how much narrower a tower is than the report's.

    Both libraries draw them with a standard deviation of 0.02, whatever the width: a narrow tower's
    first token then hardly depends on the others, and training stands still at first.
    """
    for parameter in (p for p in tower.parameters() if p.ndim >= 2):
        parameter.mul_(ratio**0.5)


def _waveform(sound: Sound, rate: int) -> np.ndarray:
    """A sound as embed_audio takes it -> its first 30 s, (n,) float32.

    A file passes through int16, as in the cache, so that it has the same embedding as there.
    """
    if isinstance(sound, str | os.PathLike):
        sound, rate = to_int16(load_audio(sound, CLIP_SAMPLES // SAMPLE_RATE)), SAMPLE_RATE
    waveform = np.asarray(sound)
    if waveform.ndim != 1 or len(waveform) == 0:
        raise InputError(f"an array of shape {waveform.shape} is no waveform: (n,) is needed, the "
                         "mean over channels, or a list of such")
    waveform = waveform[: CLIP_SAMPLES * rate // SAMPLE_RATE]
    if waveform.dtype == np.int16:
        waveform = waveform.astype(np.float32) / INT16_SCALE
    if waveform.dtype.kind != "f" or not np.isfinite(waveform).all():
        raise InputError(f"a waveform of {waveform.dtype}: int16, or finite floats in -1..1 needed")
    waveform = crop(resample(waveform.astype(np.float32), rate))
    return waveform / max(1.0, np.abs(waveform).max())


# --- Device and precision ---

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device that --device names; "auto" is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # each of torchrun's processes has its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: cannot be used here; try --device cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of which NCCL and is_bf16_supported speak
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The towers' autocast type. "auto" is bf16 on a GPU that has it, else fp16; fp32 on a CPU."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return PRECISIONS.get(name)

"""The dual encoder (report, sections 2 and 5): two towers, two linear heads, one temperature.

    sound   -> 10 s segments -> PaSST -> linear -> mean over the clip's segments -> unit norm
    caption -> tokens        -> RoBERTa's <s>   -> linear                        -> unit norm

Shapes: C clips, S segments of all clips together, Q captions, L tokens, D = 1024 embedding values,
n samples. A checkpoint holds configuration, tokenizer, weights and what they were trained on, so
that it loads with no other file and no network; what is read of it is checked in checkpoints.py.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from dualenc import InputError
from dualenc.audio import (
    CLIP_SAMPLES,
    INT16_SCALE,
    AudioTower,
    crop,
    cut,
    published_passt,
)
from dualenc.checkpoints import (
    FORMAT,
    load_strictly,
    read_model,
    read_text_model,
    write_tensors,
)
from dualenc.config import PRESETS, DualEncoderConfig
from dualenc.decoding import MAX_LEVEL, decode, to_int16
from dualenc.text import TextTower, tokenize, train_tokenizer

EMBED_CLIPS = 8  # packed at a time without gradients, and the unit that processes share
EMBED_CAPTIONS = 64


class DualEncoder(nn.Module):
    """Embeds sounds and sentences in one space, where their cosine says how well they match.

    Attributes:
        config, tokenizer: what the checkpoint holds beside the weights.
        trained_on: the "dataset/split" names that the weights have seen, teachers' included.
        precision: the towers' autocast type; None computes in float32.
    """

    def __init__(self, config: DualEncoderConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.trained_on: list[str] = []
        self.precision: torch.dtype | None = None
        self.audio = AudioTower(
            config.audio_width, config.audio_depth, config.audio_heads, config.patch,
            config.patchout,
        )
        self.text = TextTower(config.roberta())
        self.audio_projection = nn.Linear(config.audio_width, config.embedding)
        self.text_projection = nn.Linear(config.text_width, config.embedding)
        self.tau = nn.Parameter(torch.tensor(config.tau), requires_grad=config.learn_tau)

    def set_temperature(self, tau: float | None, learn: bool) -> None:
        """Start from another temperature (None keeps it), fixed or learnt."""
        tau = self.tau.item() if tau is None else tau
        self.config = dataclasses.replace(self.config, tau=tau, learn_tau=learn)
        self.tau = nn.Parameter(torch.full_like(self.tau, tau), requires_grad=learn)

    # --- The two directions, with gradients ---

    def project_segments(self, segments: Tensor) -> Tensor:
        """(S, 320000) int16 or float -> (S, D), not normalised: a clip's mean over them is its own.

        The baseline averages before the linear head; a mean passes through it unchanged.
        """
        with self._autocast():
            features = self.audio(segments)
        return self.audio_projection(features.float())

    def encode_audio(self, segments: Tensor, counts: Tensor) -> Tensor:
        """(S, 320000), (C,) segments of each clip, summing to S -> (C, D) unit norm."""
        vectors = self.project_segments(segments)
        # Unsafe: that counts sum to S is not checked, for which a GPU would be waited for.
        means = torch.segment_reduce(vectors, "mean", lengths=counts, unsafe=True)
        return F.normalize(means, dim=1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(Q, L) int64 -> (Q, D) unit norm."""
        with self._autocast():
            features = self.text(tokens)
        return F.normalize(self.text_projection(features.float()), dim=1)

    def compile_blocks(self) -> None:
        """Compile both towers block by block: one compilation serves all blocks of a tower.

        Weights and their names stay as they are. Sizes are symbolic, since those of the segments
        and captions of a batch change from step to step.
        """
        for block in [*self.audio.passt.blocks, *self.text.roberta.encoder.layer]:
            block.compile(dynamic=True)

    def _autocast(self) -> torch.autocast:
        enabled = self.precision is not None
        return torch.autocast(self.device.type, dtype=self.precision, enabled=enabled)

    # --- The two directions, for users ---

    def embed_audio(self, sounds: Iterable[str | os.PathLike | np.ndarray | Tensor]) -> Tensor:
        """Embed sounds, of each its first 30 s.

        Args:
            sounds: paths, or mono 32 kHz waveforms, (n,) float in -1..1 or int16. Taken one by
                one, so that a generator (or a progress bar around the list) will do.

        Returns:
            (N, D) float32 on the CPU, unit norm, in the order of sounds.

        Raises:
            InputError: a file cannot be read, or a waveform is not one.
        """
        with self._inference():
            parts = [
                self.encode_audio(segments.to(self.device), counts.to(self.device)).cpu()
                for segments, counts in _packed(cut(_waveform(sound)) for sound in sounds)
            ]
        return torch.cat([torch.zeros(0, self.config.embedding), *parts])

    def embed_segments(self, segments: Iterable[np.ndarray]) -> Tensor:
        """Embed 10 s segments by themselves, of sounds of any length.

        Args:
            segments: arrays (any number, 320000), as audio.cut makes them; taken one by one.

        Returns:
            (S, D) float32 on the CPU, not normalised: a sound's embedding is the mean over its
            segments, brought to unit norm.
        """
        with self._inference():
            parts = [
                self.project_segments(batch.to(self.device)).cpu() for batch, _ in _packed(segments)
            ]
        return torch.cat([torch.zeros(0, self.config.embedding), *parts])

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Embed captions: (Q, D) float32 on the CPU, unit norm."""
        order = by_length(captions)
        embeddings = torch.zeros(len(captions), self.config.embedding)
        with self._inference():
            for start in range(0, len(order), EMBED_CAPTIONS):
                rows = order[start : start + EMBED_CAPTIONS]
                tokens = tokenize(self.tokenizer, [captions[i] for i in rows])
                embeddings[rows] = self.encode_text(tokens.to(self.device)).cpu()
        return embeddings

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        training = self.training
        self.eval()  # no dropout, patchout or jitter
        try:
            with torch.inference_mode():
                yield
        finally:
            self.train(training)

    @property
    def device(self) -> torch.device:
        return self.tau.device

    # --- Making, saving, loading ---

    @classmethod
    def create(
        cls, preset: str, init: str, captions: Sequence[str], text_model: str | None = None,
        **changes,
    ) -> "DualEncoder":
        """A new model.

        Args:
            preset: "report" or "tiny".
            init: "pretrained" (published PaSST and RoBERTa weights) or "random".
            captions: a byte-level BPE is trained on them where no published tokenizer is used.
            text_model: a RoBERTa at the Hugging Face hub, or a local folder; its sizes replace the
                preset's. None stands for roberta-large if pretrained.
            changes: values of DualEncoderConfig that replace the preset's.
        """
        config = dataclasses.replace(PRESETS[preset], **changes)
        pretrained = init == "pretrained"
        if pretrained and text_model is None:
            text_model = "roberta-large"
        if text_model is None:
            tokenizer = train_tokenizer(captions, config.vocabulary)
        else:
            tokenizer, config, roberta = read_text_model(text_model, config, pretrained)
        passt = published_passt() if pretrained else None  # or the end, before a model is made
        model = cls(config, tokenizer)
        _scale_to_width(model.audio, PRESETS["report"].audio_width / config.audio_width)
        _scale_to_width(model.text, PRESETS["report"].text_width / config.text_width)
        if pretrained:
            load_strictly(model.audio.passt, passt, "the published PaSST")
            load_strictly(model.text.roberta, roberta, f"--text-model {text_model}")
        return model

    def checkpoint(self) -> dict:
        """All that load() needs, made of plain values and tensors."""
        return {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "tokenizer": self.tokenizer.to_str(),
            "trained_on": self.trained_on,
            "model": self.state_dict(),
        }

    def save(self, path: str | os.PathLike) -> None:
        write_tensors(self.checkpoint(), path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        device: str | torch.device = "cpu",
        tokenizer: str | os.PathLike | None = None,
    ) -> "DualEncoder":
        """Load a checkpoint; nothing in the file is executed.

        Args:
            path: best.pt or last.pt of a run, or the official DCASE 2025 baseline's .ckpt.
            device: where the model is put.
            tokenizer: a name, folder or tokenizer.json instead of the checkpoint's own; the
                baseline's file holds none, and roberta-large's is taken.

        Raises:
            InputError: the file is missing, damaged, or neither of the two.
        """
        saved = read_model(path, tokenizer)
        model = cls(saved.config, saved.tokenizer)
        load_strictly(model, saved.weights, path, saved.called)
        model.trained_on = saved.trained_on
        return model.to(device).eval()


def _scale_to_width(tower: nn.Module, ratio: float) -> None:
    """Scale a tower's random matrices by the root of how much narrower it is than the report's.

    Both libraries draw them with a standard deviation of 0.02, whatever the width. In a narrow
    tower the first token then hardly depends on the others, and training stands still at first.
    """
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(ratio**0.5)


def by_length(captions: Sequence[str]) -> list[int]:
    """The order in which captions are embedded: neighbours of like length need little padding."""
    return sorted(range(len(captions)), key=lambda i: len(captions[i]))


def _waveform(sound: str | os.PathLike | np.ndarray | Tensor) -> np.ndarray:
    """A sound as embed_audio takes it -> its first 30 s, (n,) float32.

    A file passes through int16, as in the cache: the same file has the same embedding by any way.
    """
    if isinstance(sound, str | os.PathLike):
        sound = to_int16(decode(sound, CLIP_SAMPLES))
    waveform = np.asarray(sound)
    if waveform.ndim != 1 or len(waveform) == 0:
        raise InputError(f"a waveform of shape {waveform.shape}: (n,) with n >= 1 is needed")
    waveform = crop(waveform)
    if waveform.dtype == np.int16:
        return waveform.astype(np.float32) / INT16_SCALE
    if waveform.dtype.kind != "f" or not np.abs(waveform).max() <= MAX_LEVEL:  # NaN is not, either
        raise InputError(f"a waveform of {waveform.dtype}: int16, or finite floats in -1..1 needed")
    return waveform.astype(np.float32)


def _packed(segments: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
    """Segments clip by clip -> batches of whole clips: (S, 320000) and (C,) segments of each."""
    clips: list[np.ndarray] = []
    for clip in segments:
        clips.append(clip)
        if len(clips) == EMBED_CLIPS:
            yield _batch(clips)
            clips = []
    if clips:
        yield _batch(clips)


def _batch(clips: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.concatenate(clips)), torch.tensor([len(clip) for clip in clips])

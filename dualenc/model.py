"""The dual encoder (report, sections 2 and 5): two towers, two linear heads, one temperature.

    sound   -> 10 s segments -> PaSST -> linear -> mean over the clip's segments -> unit norm
    caption -> tokens        -> RoBERTa's <s>   -> linear                        -> unit norm

C clips of a batch, S segments of all of them, N sounds that embed_audio is given, Q captions,
L tokens, B_r pairs of one process's share of a batch, D = 1024 values of an embedding, n samples.
"""

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from dualenc.audio import CLIP_SAMPLES, AudioTower, to_segments
from dualenc.checkpoints import load_strictly, published_passt, read_checkpoint
from dualenc.decoding import (
    INT16_SCALE, SAMPLE_RATE, AnyPath, load_audio, resample, to_int16, within_full_scale,
)
from dualenc.errors import InputError, first_line
from dualenc.text import (
    PAD_ID, ROBERTA, TextTower, load_tokenizer, published_roberta, set_truncation, tokenize,
    train_bpe,
)

EMBED_CLIPS = 8  # clips that are embedded at a time, without gradients
EMBED_CAPTIONS = 64  # captions that are embedded at a time, without gradients
Sound = str | os.PathLike | np.ndarray | Tensor  # a path, or a waveform


# --- Every size of the model; the presets ---

@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
    """The sizes of a model, stored in its checkpoint; the defaults are the report's."""

    preset: str = "report"  # also chooses training's defaults, such as the learning rate
    # PaSST, passt_s_p16_s16_128_ap468: 8 x 62 patches of a 10 s segment
    audio_width: int = 768
    audio_depth: int = 12
    audio_heads: int = 12
    patch: tuple[int, int] = (16, 16)  # mel bands, 10 ms frames
    # Rows and columns of patches that are left out in training. The report does not tell them;
    # these are the official DCASE 2025 baseline's (called the baseline from here on).
    patchout: tuple[int, int] = (2, 15)
    # RoBERTa-large
    vocab_size: int = 50_265
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    max_position_embeddings: int = 514
    text_dropout: float = 0.2  # for hidden states and attention, as in the baseline
    # the shared space
    embedding: int = 1024  # values of an embedding
    tau: float = 0.05  # the temperature, by which the losses divide cosines


ROBERTA_SIZES = (  # by transformers' names
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings",
)
PRESETS = {
    "report": DualEncoderConfig(),
    # The same code in small, for CPUs. A patch spans all 128 bands, so that there are few patches.
    # It is 16 frames long, as in the report: the backward pass of shorter ones is slow on a CPU.
    "tiny": DualEncoderConfig(
        preset="tiny", audio_width=96, audio_depth=2, audio_heads=3, patch=(128, 16),
        patchout=(0, 15), vocab_size=1000, hidden_size=96, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=384, max_position_embeddings=66, text_dropout=0.1,
    ),
}


# --- The model (sections 2 and 5) ---

class DualEncoder(nn.Module):
    """Sounds and sentences in one space, where their cosine says how well they match.

    encode_audio, encode_text and encode_pairs are for training: they take tensors of a batch, and
    gradients flow through them. embed_audio and embed_text are for users: they take sounds and
    sentences, and return float32 on the CPU. project_segments leaves out the mean over a clip's
    segments: it serves dualenc.search, which also tells where in a sound a sentence fits best.
    """

    def __init__(self, config: DualEncoderConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        # The names of all splits that these weights, or those of their teachers, were trained on.
        self.trained_on: list[str] = []
        self.stage = "contrastive"  # or "distilled"
        self.precision: torch.dtype | None = None  # the towers' autocast type; None is float32
        self.audio = AudioTower(
            config.audio_width, config.audio_depth, config.audio_heads, config.patch,
            config.patchout,
        )
        roberta_sizes = {name: getattr(config, name) for name in ROBERTA_SIZES}
        self.text = TextTower(transformers.RobertaConfig(
            **roberta_sizes, pad_token_id=PAD_ID, layer_norm_eps=1e-5, type_vocab_size=1,
            hidden_dropout_prob=config.text_dropout,
            attention_probs_dropout_prob=config.text_dropout,
        ))
        self.audio_projection = nn.Linear(config.audio_width, config.embedding)
        self.text_projection = nn.Linear(config.hidden_size, config.embedding)
        self.register_buffer("tau", torch.tensor(config.tau))  # It is not learned.

    def project_segments(self, segments: Tensor) -> Tensor:
        """Encode each segment by itself: (S, 320000) int16 or float -> (S, D), not normalised."""
        with self._autocast():
            features = self.audio(segments)
        return self.audio_projection(features.float())

    def encode_audio(self, segments: Tensor, counts: Tensor) -> Tensor:
        """Encode clips: segments (S, 320000), and how many each has (C,) -> (C, D) of unit norm."""
        # The baseline takes the mean before its linear head, which gives the same.
        vectors = self.project_segments(segments)
        # unsafe=True skips the check that counts sum to S, which would force a GPU sync.
        means = torch.segment_reduce(vectors, "mean", lengths=counts, unsafe=True)
        return F.normalize(means, dim=1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode captions: (Q, L) int64 -> (Q, D) of unit norm."""
        with self._autocast():
            features = self.text(tokens)
        return F.normalize(self.text_projection(features.float()), dim=1)

    def encode_pairs(self, batch, micro_batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Encode the pairs of a data.Batch: audio (B_r, D), text (B_r, D), both of unit norm.

        With micro_batch, the batch is encoded in pieces of so many pairs. A piece's activations are
        not kept; backward computes them again with the same random numbers. So memory is that of
        one piece, and every pair still meets all negatives of the batch (GradCache, Gao et al.
        2021).
        """

        def encode(segments, counts, clip_rows, tokens) -> tuple[Tensor, Tensor]:
            return self.encode_audio(segments, counts)[clip_rows], self.encode_text(tokens)

        if micro_batch is None:
            return encode(*batch.inputs(self.device))
        pieces = []
        # The batch is cut up on the CPU, since cutting it on a GPU would force a sync.
        for piece in batch.pieces(micro_batch):
            # The tensors are passed one by one, not in a Batch: torch restores the random state of
            # the devices on which it finds an argument, and does not look into a Batch.
            inputs = piece.inputs(self.device)
            pieces.append(recompute_in_backward(encode, *inputs, use_reentrant=False))
        audio, text = zip(*pieces, strict=True)
        return torch.cat(audio), torch.cat(text)

    def _autocast(self) -> torch.autocast:
        enabled = self.precision is not None
        return torch.autocast(self.device.type, dtype=self.precision, enabled=enabled)

    @property
    def device(self) -> torch.device:
        return self.tau.device

    # --- Embeddings for users: float32, on the CPU, of unit norm ---

    @torch.no_grad()
    def embed_audio(self, sounds: Sound | Iterable[Sound], rate: int = SAMPLE_RATE) -> Tensor:
        """Embed sounds, the first 30 s of each: (N, D). The model's mode stays as it is.

        Args:
            sounds: paths, or mono waveforms (n,) or (1, n), float in -1..1 or int16; one alone
                counts as a list of one. They are read a few at a time, so a generator or a progress
                bar will do.
            rate: the sample rate of waveforms in Hz; files tell their own.

        Raises:
            InputError: a file cannot be read, an array is no waveform, or the rate is not a whole
                number above zero.
        """
        rate = _whole_rate(rate)
        if isinstance(sounds, Sound):
            sounds = [sounds]
        waveforms = (_waveform(sound, rate) for sound in sounds)
        embeddings = [torch.zeros(0, self.config.embedding)]
        with self.evaluating():
            while clips := list(itertools.islice(waveforms, EMBED_CLIPS)):
                segments, counts = to_segments(clips)
                encoded = self.encode_audio(segments.to(self.device), counts.to(self.device))
                embeddings.append(encoded.cpu())
        return torch.cat(embeddings)

    @torch.no_grad()
    def embed_text(self, captions: str | Iterable[str]) -> Tensor:
        """Embed captions, or one alone: (Q, D). The model's mode stays as it is."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        embeddings = torch.zeros(len(captions), self.config.embedding)
        # Captions of similar length are embedded together, so that they need little padding.
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        with self.evaluating():
            for start in range(0, len(order), EMBED_CAPTIONS):
                rows = order[start : start + EMBED_CAPTIONS]
                tokens = tokenize(self.tokenizer, [captions[row] for row in rows])
                embeddings[rows] = self.encode_text(tokens.to(self.device)).cpu()
        return embeddings

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch dropout, patchout and the mel filters' jitter off within the block."""
        # Each module gets its own mode back, since a user may have switched only some to training.
        training_modules = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training_modules:
                module.training = True

    # --- Making, saving, loading ---

    @classmethod
    def create(
        cls, preset: str, init: str, captions: Sequence[str], text_model: str | None = None
    ) -> "DualEncoder":
        """Make a new model.

        Args:
            preset: "report" or "tiny".
            init: "pretrained" for the published PaSST and RoBERTa, or "random".
            captions: a tokenizer is trained on them if no published one is used.
            text_model: another RoBERTa's name or folder, in place of roberta-large. Its tokenizer
                and its sizes are taken, and with "pretrained" its weights.

        Raises:
            InputError: published weights cannot be had, or do not fit.
        """
        config = PRESETS[preset]
        pretrained = init == "pretrained"
        if pretrained:
            passt = published_passt()
            text_model = text_model or ROBERTA
        if text_model is None:
            tokenizer = train_bpe(captions, config.vocab_size)
        else:
            roberta = published_roberta(text_model)
            tokenizer = load_tokenizer(text_model)
            sizes = {name: getattr(roberta.config, name) for name in ROBERTA_SIZES}
            config = dataclasses.replace(config, **sizes)
        model = cls(config, tokenizer)
        _scale_to_width(model.audio, PRESETS["report"].audio_width / config.audio_width)
        _scale_to_width(model.text, PRESETS["report"].hidden_size / config.hidden_size)
        if pretrained:
            load_strictly(model.audio.passt, passt, "the published PaSST")
            load_strictly(model.text.roberta, roberta.state_dict(), text_model)
        return model

    def checkpoint(self) -> dict:
        """Return what torch.save writes and load() reads: plain values and tensors."""
        return {
            "config": dataclasses.asdict(self.config),
            "tokenizer": self.tokenizer.to_str(),
            "trained_on": self.trained_on,
            "stage": self.stage,
            "model": self.state_dict(),
        }

    @classmethod
    def load(
        cls, path: AnyPath, device: str | torch.device = "cpu", tokenizer: AnyPath | None = None
    ) -> "DualEncoder":
        """Load a trained model, ready to embed.

        Args:
            path: best.pt or last.pt of a run, the run's folder, salsa's or the DCASE 2025
                baseline's .ckpt; or "salsa" or "baseline", which are fetched.
            device: "cpu", "cuda", "cuda:1"; "auto" is a GPU if there is one.
            tokenizer: a name or folder, for a checkpoint that holds none, such as the two published
                ones (default roberta-large).

        Raises:
            InputError: the file or the device cannot be used, or the tokenizer does not fit.
        """
        device = _usable_device(str(device))
        saved = read_checkpoint(path)
        try:
            config = DualEncoderConfig(**saved["config"])
        except TypeError as error:
            raise InputError(f"{path}: is damaged or of another version ({error})") from error
        if saved["tokenizer"] is not None:
            tokenizer = set_truncation(Tokenizer.from_str(saved["tokenizer"]), path)
        else:
            source = tokenizer or ROBERTA
            tokenizer = load_tokenizer(source)
            entries = tokenizer.get_vocab_size()
            if entries > config.vocab_size:
                raise InputError(
                    f"{source}: its tokenizer has {entries:,} entries, more than the "
                    f"{config.vocab_size:,} that {path} has embeddings for; give its own with "
                    "--tokenizer"
                )
        model = cls(config, tokenizer)
        load_strictly(model, saved["model"], path)
        model.trained_on = saved["trained_on"]
        model.stage = saved["stage"]
        return model.to(device).eval()


@torch.no_grad()
def _scale_to_width(tower: nn.Module, ratio: float) -> None:
    """Multiply a tower's random matrices by the square root of the ratio.

    Both libraries draw them with a standard deviation of 0.02, whatever the width. In a narrow
    tower the first token would then hardly depend on the others, and training would stand still at
    first. (PaSST's patch embedding is drawn otherwise, and is multiplied all the same.)

    Args:
        ratio: the width of the report's tower / the width of this one.
    """
    for parameter in tower.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(ratio**0.5)


def _whole_rate(rate: float) -> int:
    try:
        whole = int(rate)
    except (TypeError, ValueError, OverflowError):
        whole = 0
    if whole <= 0 or whole != rate:
        raise InputError(f"rate {rate!r}: a whole number of Hz above 0 is needed")
    return whole


def _waveform(sound: Sound, rate: int) -> np.ndarray:
    """Read or convert a sound as embed_audio takes it: its first 30 s, (n,) at 32 kHz.

    A file is rounded to int16, as in the cache of decoded sounds, so that both have the same
    embedding.
    """
    if isinstance(sound, str | os.PathLike):
        sound = to_int16(load_audio(sound, CLIP_SAMPLES // SAMPLE_RATE))
        rate = SAMPLE_RATE
    elif isinstance(sound, Tensor):
        sound = sound.detach().cpu()
    waveform = np.asarray(sound)
    if waveform.ndim == 2 and len(waveform) == 1:  # (1, n), as torchaudio gives mono
        waveform = waveform[0]
    if waveform.ndim != 1 or len(waveform) == 0:
        raise InputError(
            f"an array of shape {waveform.shape} is no waveform: (n,) is needed, the mean over "
            "channels, or a list of such"
        )
    # Only the first 30 s are embedded, so no more are resampled.
    waveform = waveform[: CLIP_SAMPLES * rate // SAMPLE_RATE]
    if waveform.dtype == np.int16:
        waveform = waveform.astype(np.float32) / INT16_SCALE
    if waveform.dtype.kind != "f" or not np.isfinite(waveform).all():
        raise InputError(
            f"a waveform of {waveform.dtype}: int16, or finite floats in -1..1, are needed"
        )
    # Waveforms given as floats, and resampling, may exceed full scale.
    return within_full_scale(resample(waveform.astype(np.float32), rate))


# --- Device and precision ---

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device that --device names, and make it the current one.

    "auto" is a GPU if there is one. A device that cannot be used is an InputError.
    """
    device = _usable_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL and is_bf16_supported use the current device.
    return device


def _usable_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            _explain_unused_gpu()
    if name == "cuda":
        # Each of torchrun's processes has a GPU of its own.
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise InputError(f"device {name}: cannot be used here ({reason}); try cpu") from error


def _explain_unused_gpu() -> None:
    """Print torch's reason if a GPU is in the machine, but torch cannot use it."""
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        return
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        print(f"a GPU is here, but torch cannot use it: {first_line(error)}", file=sys.stderr)


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Return the towers' autocast type; None is float32.

    "auto" is bf16 on a GPU that computes in it, else fp16; on a CPU it is fp32.
    """
    if name == "auto" and device.type != "cuda":
        name = "fp32"
    elif name == "auto":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "fp16" and device.type == "cpu":
        print("fp16 is slow on most CPUs, and less exact: fp32 suits them", file=sys.stderr)
    return PRECISIONS[name]

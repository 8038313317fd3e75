"""Every size of the model, as a dataclass; the presets. Stored in each checkpoint."""

import dataclasses
import math

from transformers import RobertaConfig

from dualenc.audio import MEL_BANDS, SEGMENT_FRAMES
from dualenc.text import MAX_TOKENS, PAD_ID, ROBERTA

TAU_BOUNDS = (0.005, 1.0)  # of a learnable temperature: beyond them the loss over- or underflows
PRESET_NAMES = ("report", "tiny")


@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
    """Every size of the model; the defaults are the report's. Stored in the checkpoint.

    Raises:
        TypeError, ValueError: a value is of another kind than its default, or no model has it.
    """

    preset: str = "report"  # whose training defaults suit the model
    # PaSST, passt_s_p16_s16_128_ap468: 8 x 62 patches of a 10 s segment
    audio_width: int = 768
    audio_depth: int = 12
    audio_heads: int = 12
    patch: tuple[int, int] = (16, 16)  # mel bands, 10 ms frames
    patchout: tuple[int, int] = (2, 15)  # rows, columns of patches left out in training
    # RoBERTa-large
    vocabulary: int = 50_265
    text_width: int = 1024
    text_depth: int = 24
    text_heads: int = 16
    text_hidden: int = 4096
    text_positions: int = 514
    text_dropout: float = 0.2  # of hidden states and attention, as in the baseline
    # the shared space
    embedding: int = 1024
    tau: float = 0.05
    learn_tau: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if not isinstance(value, kind):
                raise TypeError(f"{field.name} is a {type(value).__name__}")
            if kind is int and value < 1:
                raise ValueError(f"{field.name} is {value}")
        if self.preset not in PRESET_NAMES:
            raise ValueError("its preset is unknown")
        for pair, least in ((self.patch, 1), (self.patchout, 0)):
            if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
                raise ValueError("patch and patchout are not pairs of sizes")
        rows, columns = MEL_BANDS // self.patch[0], SEGMENT_FRAMES // self.patch[1]
        if not (self.patchout[0] < rows and self.patchout[1] < columns):
            raise ValueError(f"patchout {self.patchout} leaves none of {rows} x {columns} patches")
        if self.audio_width % self.audio_heads or self.text_width % self.text_heads:
            raise ValueError("the heads do not divide the width")
        if self.text_positions < PAD_ID + 1 + MAX_TOKENS:
            raise ValueError(f"text_positions {self.text_positions} are too few for a caption")
        if not 0 <= self.text_dropout < 1:
            raise ValueError(f"text_dropout is {self.text_dropout}")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau is {self.tau}")

    def roberta(self) -> RobertaConfig:
        """The text tower's part, as transformers takes it."""
        return RobertaConfig(
            vocab_size=self.vocabulary, hidden_size=self.text_width,
            num_hidden_layers=self.text_depth, num_attention_heads=self.text_heads,
            intermediate_size=self.text_hidden, max_position_embeddings=self.text_positions,
            hidden_dropout_prob=self.text_dropout, attention_probs_dropout_prob=self.text_dropout,
            **ROBERTA,
        )

    def with_roberta(self, roberta: RobertaConfig) -> "DualEncoderConfig":
        """With another RoBERTa's sizes."""
        return dataclasses.replace(
            self, vocabulary=roberta.vocab_size, text_width=roberta.hidden_size,
            text_depth=roberta.num_hidden_layers, text_heads=roberta.num_attention_heads,
            text_hidden=roberta.intermediate_size, text_positions=roberta.max_position_embeddings,
        )

    def telling_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights that tell every size on which the others depend, by name."""
        audio, text = self.audio_width, self.text_width
        shapes = {
            "audio.passt.patch_embed.proj.weight": (audio, 1, *self.patch),
            "audio_projection.weight": (self.embedding, audio),
            "text.roberta.embeddings.word_embeddings.weight": (self.vocabulary, text),
            "text.roberta.embeddings.position_embeddings.weight": (self.text_positions, text),
            "text_projection.weight": (self.embedding, text),
        }
        for i in range(self.audio_depth):
            shapes[f"audio.passt.blocks.{i}.mlp.fc1.weight"] = (4 * audio, audio)
        for i in range(self.text_depth):
            layer = f"text.roberta.encoder.layer.{i}"
            shapes[f"{layer}.attention.self.query.weight"] = (text, text)
            shapes[f"{layer}.intermediate.dense.weight"] = (self.text_hidden, text)
        return shapes


PRESETS = {
    "report": DualEncoderConfig(),
    # The same code with smaller numbers, learnt from scratch in a minute on two cores.
    "tiny": DualEncoderConfig(
        preset="tiny",
        audio_width=96, audio_depth=2, audio_heads=3, patch=(128, 8), patchout=(0, 30),
        vocabulary=1000, text_width=96, text_depth=2, text_heads=3, text_hidden=384,
        text_positions=66, text_dropout=0.1,
    ),
}

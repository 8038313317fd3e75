"""Text-to-audio retrieval with a dual encoder: PaSST for sounds, RoBERTa for sentences."""

from dualenc.errors import InputError
from dualenc.model import DualEncoder

__all__ = ["DualEncoder", "InputError"]

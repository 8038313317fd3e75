"""Text-to-audio retrieval with a dual encoder: PaSST for sounds, RoBERTa for sentences."""

from dualenc.errors import InputError
from dualenc.model import DualEncoder

__version__ = "1.0"
__all__ = ["DualEncoder", "InputError"]

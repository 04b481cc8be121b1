"""The formats of an export. One file a format; importing them here makes their short names resolve."""

from lit_prune.export.formats.base import ExportFormat, Tolerance
from lit_prune.export.formats.gguf import GGUF
from lit_prune.export.formats.huggingface import HuggingFace
from lit_prune.export.formats.packed import Packed

__all__ = ["GGUF", "ExportFormat", "HuggingFace", "Packed", "Tolerance"]

"""Text and conversations as token windows, and the loaders that a resumed run continues."""

from lit_prune.data.base import DatasetKind, Source
from lit_prune.data.chat.conversations import ConversationData, Instructions
from lit_prune.data.sources import HubDataset, LocalFiles, PythonDocs
from lit_prune.data.text import TextData

__all__ = [
    "ConversationData",
    "DatasetKind",
    "HubDataset",
    "Instructions",
    "LocalFiles",
    "PythonDocs",
    "Source",
    "TextData",
]

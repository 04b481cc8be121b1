"""Trains the embedded model's tokenizer: ``python tools/train_tokenizer.py FOLDER``.

Byte-level BPE of 4,096 tokens over the training part of Python's documentation.
"""

from __future__ import annotations

import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_prune.data.python_docs import python_docs

VOCABULARY = 4096
END = "<|endoftext|>"


def train_tokenizer(folder: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json into ``folder``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    bpe.train_from_iterator((row["text"] for row in python_docs("train")), trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/train_tokenizer.py FOLDER")
    train_tokenizer(sys.argv[1])

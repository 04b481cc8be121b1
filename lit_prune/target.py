"""Sizes that a pruned model is to have, as users write them, and the bytes that stored weights take."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import bytes_in

COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class StoredBytes:
    """The bytes that the weights of a model take in an exported folder.

    Attributes:
        total: Bytes of all weights.
        per_weight: Bytes of one weight of a linear; 34 / 32 for 8 bits with one scale of 16 bits for 32 weights.
        row_multiple: Number of which the length of a row must be a multiple for that; others are stored larger.
    """

    total: float
    per_weight: float
    row_multiple: int = 1

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype | None = None) -> StoredBytes:
        """Returns the bytes of ``model`` in ``dtype``; None is its own."""
        chosen = dtype or model.dtype
        return cls(bytes_in(model, chosen), chosen.itemsize)


def parse_parameters(value: int | str) -> int:
    """Returns the number of parameters in `pruning.target_parameters`.

    >>> parse_parameters("1.2B"), parse_parameters("100M"), parse_parameters(100_000_000)
    (1200000000, 100000000, 100000000)
    """
    return _parse("target_parameters", value, COUNTS, "100M, 1.2B or 100000000")


def parse_bytes(value: int | str) -> int:
    """Returns the number of bytes in `pruning.target_bytes`; MB are 10^6 bytes, MiB are 2^20.

    >>> parse_bytes("200MB"), parse_bytes("1.5 GiB")
    (200000000, 1610612736)
    """
    return _parse("target_bytes", value, BYTES, "200MB, 1.5GB or 200000000")


def _parse(field: str, value: int | str, units: Mapping[str, int], examples: str) -> int:
    """Returns the product of a number and its unit; raises InputError unless it is at least 1."""
    text = str(value).strip().lower()
    if re.match(r"\d{1,3}(,\d{3})+(?!\d)", text):  # as messages and reports write numbers
        text = text.replace(",", "")
    found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)", text)
    unit = units.get(found[2], 0) if found is not None else 0
    number = float(found[1]) * unit if found is not None else 0.0
    if not 1 <= number < math.inf or (unit == 1 and number % 1):  # 3.2 without its M
        raise InputError(f"`pruning.{field}` must be a number such as {examples}, got {value!r}.")
    return round(number)

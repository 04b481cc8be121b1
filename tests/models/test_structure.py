"""Structures are recorded in the config, and found again by the path of their class."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import final

import pytest
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.models import structure
from lit_prune.models.structure import Description, Structure, add_structure, describe, structures


@final
@dataclass(frozen=True)
class Vocabulary(Structure):
    """A model that knows fewer words."""

    words: int

    def rebuild(self, model: PreTrainedModel) -> None:
        model.resize_token_embeddings(self.words)

    def describe(self, model: PreTrainedModel) -> Description:
        return Description("vocabulary", {}, "Cut", "fewer words.", {}, "words", "word", (self.words,), 64, 0.0)


@final
@dataclass(frozen=True)
class Depth(Structure):
    """Another kind, which nothing is known of."""

    def rebuild(self, model: PreTrainedModel) -> None:
        raise NotImplementedError

    def describe(self, model: PreTrainedModel) -> Description:
        raise NotImplementedError


def test_a_structure_comes_back_from_the_config(model: PreTrainedModel) -> None:
    assert structures(model) == ()
    structure.write(model, rates=[0.5])
    add_structure(model, Vocabulary(48))
    fields = {"kind": "tests.models.test_structure.Vocabulary", "words": 48}
    assert json.loads(model.config.to_json_string())["lit_prune"] == {"rates": [0.5], "structures": [fields]}
    assert structures(model) == (Vocabulary(48),)
    assert [described.sizes for described in describe(model)] == [(48,)]


def test_the_latest_of_a_kind_replaces_the_earlier_and_comes_last(model: PreTrainedModel) -> None:
    for shape in (Vocabulary(48), Depth(), Vocabulary(40)):
        add_structure(model, shape)
    assert structures(model) == (Depth(), Vocabulary(40))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no_such_package.Shape", "`model`: its config names the structure no_such_package.Shape, which cannot be im"),
        ("tests.models.test_structure.Width", "test_structure.Width, which tests.models.test_structure does not have"),
        (
            "tests.models.test_structure.pytest",
            "the structure tests.models.test_structure.pytest, which",
        ),
    ],
)
def test_a_structure_that_is_not_there(kind: str, message: str, model: PreTrainedModel) -> None:
    structure.write(model, structures=[{"kind": kind}])
    with pytest.raises(InputError, match=message):
        structures(model)


def test_a_structure_of_another_version(model: PreTrainedModel) -> None:
    structure.write(model, structures=[{"kind": "lit_prune.depth.remaining.RemainingBlocks", "gone": 3}])
    with pytest.raises(InputError, match=r"has a RemainingBlocks of another version of lit_prune \(.*'gone'\): cut"):
        structures(model)


def test_the_record_of_a_cut_replaces_that_of_an_earlier_one(model: PreTrainedModel) -> None:
    for added in (2, 0):
        structure.write_cut(model, {"sparsity": added}, [0.5], added=added)
        assert structure.record(model) == {"recipe": {"sparsity": added}, "rates": [0.5], "added": added}
        structure.write(model, recovery="LoRA(r=8)", distillation="Distillation()", form="adapter")  # after this one


def test_descriptions_of_one_cut_are_joined() -> None:
    facts, rows = {"units": [8]}, {"channels": "8"}
    widths = Description("mlp_width", facts, "Shrunk", "8 of 16.", rows, "channels", "size", (8,), 16, 0.5)
    changes = {"facts": {"units": [2]}, "outcome": "2 of 4.", "rows": {"groups": "2"}, "sizes": (2,)}
    groups = replace(widths, name="head_groups", **changes)  # type: ignore[arg-type]
    joined = structure.joined([widths, groups], "shrink")
    assert joined.facts == {"parts": {"mlp_width": {"units": [8]}, "head_groups": {"units": [2]}}}
    assert (joined.name, joined.outcome, joined.rows) == (
        "shrink",
        "8 of 16; 2 of 4.",
        {"channels": "8", "groups": "2"},
    )
    assert (joined.sizes, joined.parts) == ((8,), (widths, groups))
    assert structure.joined([groups], "shrink") is groups
    assert joined.done == "Shrunk"
    assert structure.joined([replace(widths, done="Shortened"), groups], "shrink").done == "Shrunk"

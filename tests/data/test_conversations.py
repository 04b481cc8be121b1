"""Conversations: what of them is an answer, and that packed they are what they are alone."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.allocate import LayerRedundancy
from lit_prune.data.conversations import (
    IGNORED,
    Conversations,
    Instructions,
    PackedConversations,
    encode,
    examples,
)
from lit_prune.data.datamodule import TextDataModule
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.models.families import packs
from lit_prune.models.load import load_tokenizer
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.slice import Slicing
from tests.conftest import FAMILIES, lively_model

TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ ' ' + m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}Q {{ m.content }} A{% endif %}{% endfor %}"
)
LAST_ONLY = (
    "{% for m in messages %}{{ m.role }}: {% if loop.last %}now {% endif %}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "system", "content": "You return what is asked for."},
    {"role": "user", "content": "Open the file."},
    {"role": "assistant", "content": "The file is open."},
    {"role": "user", "content": "Close it."},
    {"role": "assistant", "content": "It is closed."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("embedded")


def learnt(tokenizer: Tokenizer, template: str, talk: list[dict[str, str]] = TALK) -> str:
    """What of a conversation is trained, as text."""
    tokenizer.chat_template = template
    ids, labels = encode(talk, tokenizer)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(talk, tokenize=False)
    return tokenizer.decode([label for label in labels if label != IGNORED])


def test_answers_alone_are_learnt_with_what_ends_them(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token
    assert learnt(tokenizer, TURNS) == f" The file is open.{end}\n It is closed.{end}\n"
    assert learnt(tokenizer, MARKED) == f" The file is open.{end} It is closed.{end}"


def test_the_prompt_is_not_learnt_where_an_answer_repeats_it(tokenizer: Tokenizer) -> None:
    talk = [{"role": "user", "content": "x y"}, {"role": "assistant", "content": "x y"}]
    tokenizer.chat_template = TURNS
    ids, labels = encode(talk, tokenizer)
    prompt = tokenizer("user: x y\nassistant:", add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]


def test_a_template_that_renders_a_beginning_otherwise_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        InputError, match=r"must mark answers by \{% generation %\}: the beginning of a row is rendered"
    ):
        learnt(tokenizer, LAST_ONLY)


def test_a_template_that_refuses_a_role(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('no systems here') }}"
    with pytest.raises(InputError, match="the chat template cannot render row 3: no systems here"):
        encode(TALK, tokenizer, "row 3")


ROWS = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}, {"input_ids": [5, 6], "labels": [-100, 6]}]


def test_padding_by_hand() -> None:
    rows = Conversations(ROWS, pad=0)
    assert {name: tensor.tolist() for name, tensor in rows.collate([rows[0], rows[1]]).items()} == {
        "input_ids": [[1, 2, 3, 4], [5, 6, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[-100, -100, 3, 4], [-100, 6, -100, -100]],
    }
    assert rows.told == "2 conversations of up to 4 tokens"


def test_packing_by_hand() -> None:
    rows = PackedConversations([*ROWS, {"input_ids": [7, 8], "labels": [7, 8]}], seq_length=7, pad=0)
    assert rows.told == "2 windows of 7 tokens"
    assert {name: tensor.tolist() for name, tensor in rows[0].items()} == {
        "input_ids": [1, 2, 3, 4, 5, 6, 0],
        "labels": [-100, -100, 3, 4, -100, 6, -100],
        "position_ids": [0, 1, 2, 3, 0, 1, 0],
    }
    assert rows[1]["labels"].tolist() == [-100, 8, -100, -100, -100, -100, -100]  # nothing comes before the 7
    assert rows[1]["position_ids"].tolist() == [0, 1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_a_conversation_is_what_it_is_alone(family: str) -> None:
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 64, (length,), generator=random).tolist() for length in (9, 14, 5, 12)]
    rows = [{"input_ids": row, "labels": [IGNORED] * 3 + row[3:]} for row in ids]
    model, padded = lively_model(family), Conversations(rows, pad=0)
    packed = PackedConversations(rows, seq_length=30, pad=0)
    alone = measure(model, [padded.collate([padded[index] for index in range(4)])], "x")
    batch = {name: torch.stack([packed[0][name], packed[1][name]]) for name in packed[0]}
    together = measure(model, [batch], "x")
    assert alone.protocol.tokens == together.protocol.tokens == sum(len(row) - 3 for row in ids)
    assert (together.perplexity == pytest.approx(alone.perplexity, rel=1e-4)) is packs(model.config)
    del batch["position_ids"]
    assert measure(model, [batch], "x").perplexity != pytest.approx(alone.perplexity, rel=1e-4)


def module(tmp_path: Path, rows: list[dict], held_out: list[dict] | None = None, **fields: object) -> TextDataModule:
    for name, lines in {"train": rows, "val": held_out or rows[-1:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    settings: dict = {"instructions": Instructions(chat_template=TURNS), "seq_length": 64, "batch_size": 2}
    files = {f"{name}_files": str(tmp_path / f"{name}.jsonl") for name in ("train", "val")}
    return TextDataModule(**{**files, **settings, **fields})


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"What is {number}?", "completion": f"It is a number, {number}."}


def test_rows_of_messages_and_of_pairs_are_the_same(tmp_path: Path) -> None:
    pairs = [pair(number) for number in range(6)]
    talks = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in pairs
    ]
    first = module(tmp_path, pairs).examples("train")
    assert first == module(tmp_path, talks).examples("train")
    named = [{"q": row["prompt"], "a": row["completion"], "other": 1} for row in pairs]
    columns = Instructions(prompt="q", answer="a", chat_template=TURNS)
    assert first == module(tmp_path, named, instructions=columns).examples("train")


def test_what_stands_in_validation_is_not_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = module(tmp_path, [pair(number) for number in range(6)], [pair(2), pair(9)])
    assert len(data.examples("train")) == 5
    assert "1 conversations of the training data stand in the validation data too" in capsys.readouterr().err
    with pytest.raises(InputError, match="training and validation data must not be the same"):
        module(tmp_path, [pair(1)], [pair(1), pair(2)]).examples("train")


def test_long_conversations_are_cut_and_those_without_answer_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "word " * 60, "completion": "never read"}
    data = module(tmp_path, [pair(1), {"prompt": "What?", "completion": "word " * 90}, long, pair(2)])
    assert [len(row["input_ids"]) <= 64 for row in data.examples("train")] == [True, True]
    assert "2 of 3 conversations are longer than 64 tokens and are cut; 1 keep no answer" in capsys.readouterr().err
    with pytest.raises(
        InputError, match=r"`data.seq_length` must be longer: no conversation has an answer in its first"
    ):
        module(tmp_path, [long, pair(2)]).examples("train")


@pytest.mark.parametrize("packed", [False, True])
def test_loaders(tmp_path: Path, packed: bool) -> None:
    rows = [pair(number) for number in range(40)]
    data = module(tmp_path, rows, instructions=Instructions(chat_template=TURNS, packed=packed), val_windows=1)
    batches = list(data.train_dataloader())
    assert sum(int((batch["labels"] != IGNORED).sum()) for batch in batches) == sum(
        label != IGNORED for row in data.examples("train") for label in row["labels"]
    )
    assert ("position_ids" in batches[0]) is packed
    assert len(data.val_dataloader()) == 1
    assert data.describe("val") == "val.jsonl, answers alone"
    windows = data.calibration_windows(2, 16, 0)
    assert windows.input_ids_NT.shape == (2, 16)
    assert "packed" in data.resume_settings()["data.instructions"]


MISTAKES = [
    ([{"text": "x"}], {}, r"`data.instructions.messages` must be a column of .*train.jsonl, .* it has text"),
    ([{"messages": [{"role": "user", "content": "x"}]}], {}, r"row 1 of .*train.jsonl must have an answer"),
    ([{"messages": [{"role": "user"}]}], {}, r"row 1 of .* must be made of texts, a `role` and a `content` each"),
    ([{"messages": "x"}], {}, r"must be made of texts"),
    ([pair(1)], {"instructions": Instructions()}, r"chat_template` must be given, the tokenizer of embedded has none"),
    (
        [pair(1)],
        {"instructions": Instructions(chat_template="no.jinja")},
        r"a Jinja template or a file, got 'no.jinja'",
    ),
    ([pair(1)], {"separator": "x"}, r"`data.separator` must be left out with `data.instructions`"),
    ([pair(1)], {"train_files": None, "val_files": None}, r"`data.instructions` needs `data.train_files`"),
]


@pytest.mark.parametrize(("rows", "fields", "message"), MISTAKES, ids=[message[:40] for *_, message in MISTAKES])
def test_a_mistake_is_told(rows: list[dict], fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        module(tmp_path, rows, [pair(9)], **fields).examples("train")


def test_a_template_in_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "chat.jinja").write_text(TURNS)
    Instructions(chat_template=str(tmp_path / "chat.jinja")).ready(tokenizer, "x")
    assert tokenizer.chat_template == TURNS
    conversations = Instructions().conversations
    from datasets import Dataset

    assert len(examples(conversations(Dataset.from_list([pair(1)]), "x"), tokenizer, 64)) == 1


def test_packed_in_a_sliced_model() -> None:
    model = lively_model("llama")
    batches = list(torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(0)).split(2))
    prune(model, batches, Recipe(Slicing(), 0.25, LayerRedundancy()))
    rows = [
        {"input_ids": list(range(begin, begin + 9)), "labels": list(range(begin, begin + 9))} for begin in (1, 20, 40)
    ]
    padded, packed = Conversations(rows, pad=0), PackedConversations(rows, seq_length=30, pad=0)
    alone = measure(model, [padded.collate([padded[index] for index in range(3)])], "x").perplexity
    together = measure(model, [{name: tensor[None] for name, tensor in packed[0].items()}], "x").perplexity
    assert together == pytest.approx(alone, rel=1e-4)

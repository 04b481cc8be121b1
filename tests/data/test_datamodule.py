"""The data module: fields, loaders, and what is refused before work begins."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_prune import distributed
from lit_prune.data.datamodule import TextDataModule
from lit_prune.errors import InputError
from tests.conftest import small_model

SENTENCE = "Return the number of items in a container, and raise an error if there are none.\n"


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write(tmp_path / "train.txt", SENTENCE * 40)


@pytest.fixture
def val(tmp_path: Path) -> str:
    return write(tmp_path / "val.txt", "Open the file and read its lines.\n" * 60)


def test_a_text_file_is_tokenised_as_one_string(train: str, val: str) -> None:
    data = TextDataModule(train_files=train, val_files=[val], seq_length=16, batch_size=4)
    data.setup("fit")
    expected = data.tokenizer(Path(train).read_text())["input_ids"]
    assert data.stream("train").tolist() == expected
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].shape == (4, 16)
    assert batch["input_ids"].flatten().tolist() == data.stream("val")[:64].tolist()
    assert data.describe("val") == "val.txt"


def test_local_files_replace_the_source(train: str) -> None:
    data = TextDataModule(source="nobody/nothing", train_files=train, seq_length=8)
    assert len(data.stream("train")) > 8
    with pytest.raises(InputError, match="`data.val_files` must be given: local files replace `data.source`"):
        data.setup("validate")


def test_the_encoding_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes((SENTENCE * 9 + "café").encode("latin-1"))
    data = TextDataModule(train_files=str(tmp_path / "a.txt"), encoding="latin-1", seq_length=8)
    assert data.tokenizer.decode(data.stream("train")).endswith("café")
    with pytest.raises(InputError, match="`data.encoding` must be null or an encoding"):
        TextDataModule(encoding="klat")


def test_calibration_windows_come_from_the_training_text(train: str, val: str) -> None:
    data = TextDataModule(train_files=train, val_files=val, seq_length=16)
    windows = data.calibration_windows(3, 20, seed=0)
    stream = data.stream("train").tolist()
    for window, start in zip(windows.input_ids_NT.tolist(), windows.positions, strict=True):
        assert window == stream[start : start + 20]


def test_training_windows_are_shuffled_by_the_seed(train: str, val: str) -> None:
    def order(seed: int) -> list[list[int]]:
        data = TextDataModule(train_files=train, val_files=val, seq_length=16, seed=seed)
        return [row for batch in data.train_dataloader() for row in batch["input_ids"].tolist()]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1))


def test_fewer_training_windows_than_processes_are_refused_at_once(
    train: str, val: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TextDataModule(train_files=train, val_files=val, seq_length=300)
    data.setup("fit")
    count = len(data.windows("train"))
    monkeypatch.setattr(distributed, "world_size", lambda: count + 1)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with pytest.raises(InputError, match=f"must have a window for every process, got {count} for {count + 1} proc"):
        data.setup("fit")
    data.setup("validate")


def test_validation_is_capped(train: str, val: str) -> None:
    data = TextDataModule(train_files=train, val_files=val, seq_length=8, batch_size=4, val_windows=6)
    assert [len(batch["input_ids"]) for batch in data.val_dataloader()] == [4, 2]


def test_a_tokenizer_larger_than_the_model_is_refused_before_text_is_read(
    train: str, val: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TextDataModule(train_files=train, val_files=val, seq_length=8)
    monkeypatch.setattr(type(data.kind), "stream", lambda *_: pytest.fail("text was read"))
    message = "`data.tokenizer` must be that of the model, which has embeddings of 64 tokens, embedded gives token 4095"
    with pytest.raises(InputError, match=message):
        data.check_vocabulary(small_model().config)
    fresh = TextDataModule(train_files=train, val_files=val, seq_length=8)
    fresh.trainer = SimpleNamespace(lightning_module=SimpleNamespace(config=small_model().config))  # type: ignore[assignment]
    with pytest.raises(InputError, match=message):
        fresh.setup("fit")


def test_a_token_that_was_added_is_refused_where_the_text_has_it(train: str, tmp_path: Path) -> None:
    small = TextDataModule(train_files=train, seq_length=8)
    small.tokenizer.add_tokens(["<image>"])
    config = small_model(vocab_size=small.tokenizer.vocab_size).config
    small.check_vocabulary(config)
    small.stream("train")
    image = TextDataModule(train_files=write(tmp_path / "image.txt", SENTENCE + "<image>"), seq_length=8)
    image.tokenizer.add_tokens(["<image>"])
    image.check_vocabulary(config)
    with pytest.raises(InputError, match="embedded gives token 4096"):
        image.calibration_windows(1, 8, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq_length": 1}, "`data.seq_length` must be at least 2"),
        ({"val_seq_length": 1}, "`data.val_seq_length` must be at least 2"),
        ({"batch_size": 0}, "`data.batch_size` must be at least 1"),
        ({"val_windows": 0}, "`data.val_windows` must be at least 1"),
        ({"source": None}, "`data.source` must be given"),
        ({"source": "python-doc"}, "Did you mean python-docs"),
        ({"source": "./folder"}, "for ./folder use `data.train_files`"),
        ({"source": "some/set", "train_split": "test", "val_split": "test"}, "`data.val_split` must differ"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextDataModule(**fields).stream("train")  # type: ignore[arg-type]

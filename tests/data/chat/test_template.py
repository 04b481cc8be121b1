"""Conversations as tokens: which of them are answers, under templates of every habit."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.data.chat.template import encode, set_chat_template
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import IGNORED
from lit_prune.models.load import load_tokenizer

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
# As Qwen3's: the thoughts of all answers but the last are removed.
THINKING = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
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
    """The answers of a conversation, as text."""
    tokenizer.chat_template = template
    encoded = encode(talk, tokenizer)
    assert all(label in (IGNORED, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(talk, tokenize=False)
    return tokenizer.decode([label for label in encoded.labels if label != IGNORED])


def test_answers_alone_are_learnt_with_what_ends_them(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token
    assert learnt(tokenizer, TURNS) == f" The file is open.{end}\n It is closed.{end}\n"
    assert learnt(tokenizer, MARKED) == f" The file is open.{end} It is closed.{end}"


def test_the_prompt_is_not_learnt_where_an_answer_repeats_it(tokenizer: Tokenizer) -> None:
    talk = [{"role": "user", "content": "x y"}, {"role": "assistant", "content": "x y"}]
    tokenizer.chat_template = TURNS
    encoded = encode(talk, tokenizer)
    prompt = tokenizer("user: x y\nassistant:", add_special_tokens=False)["input_ids"]
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.labels == [IGNORED] * len(prompt) + encoded.ids[len(prompt) :]


def test_a_model_that_thinks_learns_its_last_answer(tokenizer: Tokenizer) -> None:
    thoughts = [
        {**message, "content": f"<think>so</think>{message['content']}"} if message["role"] == "assistant" else message
        for message in TALK
    ]
    assert learnt(tokenizer, THINKING, thoughts) == " <think>so</think>It is closed.\n"
    assert encode(thoughts, tokenizer).last_only
    assert learnt(tokenizer, THINKING, thoughts[:3]) == " <think>so</think>The file is open.\n"
    assert not encode(thoughts[:3], tokenizer).last_only


def test_a_template_that_renders_a_beginning_otherwise_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        InputError, match=r"must mark answers with \{% generation %\}: it renders the beginning of a row"
    ):
        learnt(tokenizer, LAST_ONLY)


def test_a_template_that_refuses_a_role(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('no systems here') }}"
    with pytest.raises(InputError, match="the chat template cannot render row 3: no systems here"):
        encode(TALK, tokenizer, "row 3")


def test_a_template_in_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "chat.jinja").write_text(TURNS)
    set_chat_template(tokenizer, str(tmp_path / "chat.jinja"), "x")
    assert tokenizer.chat_template == TURNS
    set_chat_template(tokenizer, None, "x")
    assert tokenizer.chat_template == TURNS


def test_no_template(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat_template` must be given, the tokenizer of embedded has none"):
        set_chat_template(tokenizer, None, "embedded")
    with pytest.raises(InputError, match="a Jinja template or a file, got 'no.jinja'"):
        set_chat_template(tokenizer, "no.jinja", "embedded")

import ast

from lit_prune.data.python_docs import (
    _docstrings,
    _documents,
    _is_validation,
    _paragraphs,
    _without,
    python_docs,
)


def test_parts_share_no_text_and_hang_on_the_name() -> None:
    train, val = python_docs("train"), python_docs("validation")
    assert sum(len(row["text"]) for row in train) > 1e6
    assert sum(len(row["text"]) for row in val) > 5e4
    assert all(_is_validation(row["name"]) for row in val)
    assert not any(_is_validation(row["name"]) for row in train)
    assert not _paragraphs(val) & _paragraphs(train)


def test_both_parts_are_one_mixture() -> None:
    for part in ("train", "validation"):
        names = [row["name"] for row in python_docs(part)]
        topics = [name for name in names if name.startswith("topics.")]
        assert topics
        assert len(topics) < len(names) / 2


def test_docstrings_stand_under_what_they_document() -> None:
    tree = ast.parse('"""Top."""\nclass A:\n    """Of A."""\n    def f(self, x=1):\n        """Of f."""\n')
    assert list(_docstrings(tree, "module m")) == [
        ("module m", "Top."),
        ("class A", "Of A."),
        ("def f(self, x=1)", "Of f."),
    ]


def test_a_text_that_was_seen_is_left_out() -> None:
    named = {"a": [("h", "one"), ("h", "two")], "b": [("h", "two")]}
    assert sorted(row["text"] for row in _documents(named)) in (["h\none", "h\ntwo"], ["h\none\n\nh\ntwo"])


def test_shared_paragraphs_are_dropped_and_short_ones_stay() -> None:
    long = "a paragraph that is long enough to be told apart from a phrase"
    documents = [{"name": "a", "text": f"short\n\n{long}\n\nrest"}, {"name": "b", "text": long}]
    assert _paragraphs(documents) == {long}
    assert _without(documents, {long}) == [{"name": "a", "text": "short\n\nrest"}]

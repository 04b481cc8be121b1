from dataclasses import dataclass, field
from typing import Any

from lit_prune.report.plain import OMIT, fields_to_plain, json_form, to_plain
from lit_prune.schedule import Cut


@dataclass(frozen=True)
class Inner:
    share: float


@dataclass(frozen=True)
class Derived:
    share: float

    def to_dict(self) -> dict[str, Any]:
        return {"percent": 100 * self.share, "inner": Inner(self.share)}


@dataclass(frozen=True)
class Outer:
    first: tuple[Inner, ...]
    second: Inner | None = None
    third: int | None = field(default=None, metadata=json_form(none_as=OMIT))
    fourth: int | None = field(default=None, metadata=json_form(key="4th", none_as={}))


def test_dataclasses_become_dicts_and_tuples_lists() -> None:
    assert to_plain(Outer((Inner(0.5),), third=3)) == {
        "first": [{"share": 0.5}],
        "second": None,
        "third": 3,
        "4th": {},
    }
    assert to_plain({"a": (1, (2.0, None))}) == {"a": [1, [2.0, None]]}
    assert to_plain(Cut(4, 0.5)) == {"step": 4, "sparsity": 0.5}


def test_a_field_that_is_none_may_be_left_out() -> None:
    assert list(to_plain(Outer(()))) == ["first", "second", "4th"]


def test_a_record_may_have_a_form_of_its_own() -> None:
    assert to_plain([Derived(0.5)]) == [{"percent": 50.0, "inner": {"share": 0.5}}]
    assert fields_to_plain(Derived(0.5)) == {"share": 0.5}

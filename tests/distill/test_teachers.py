"""What every teacher must do: say what the dense model says, whatever becomes of the student."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import Uniform
from lit_prune.distill import (
    Copy,
    DenseModel,
    Distillation,
    DistillationHook,
    SparseDelta,
    Student,
    Teacher,
    TeacherState,
    TopK,
)
from lit_prune.errors import InputError
from lit_prune.pipeline import prune
from lit_prune.prune import Magnitude, SparseGPT, Wanda
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA
from lit_prune.slice import Slicing
from tests.conftest import FAMILIES, small_model

CPU = torch.device("cpu")
EXACT = [Copy(), SparseDelta()]
ROUGH = {Copy("bfloat16"): 0.05, Copy("nf4"): 0.6, TopK(64): 0.004, TopK(32): 0.004}  # greatest difference of log q
IDS = torch.randint(1, 64, (3, 16), generator=torch.Generator().manual_seed(2))


def kept(teacher: Teacher, model: PreTrainedModel, student: Student, **fields: Any) -> TeacherState:
    batches = fields.pop("windows", [{"input_ids": IDS}])
    teacher.check(student)
    return teacher.prepare(DenseModel(model, student, 1.0, CPU, lambda: batches, **fields))


def says(
    teacher: TeacherState, model: PreTrainedModel, ids: torch.Tensor = IDS, **inputs: torch.Tensor
) -> torch.Tensor:
    """The teacher's log-probabilities of all positions, with what the model has to say of the others."""
    log_p = model(ids).logits.detach().flatten(0, 1).log_softmax(-1)
    return teacher.output({"input_ids": ids, **inputs}).log_q(torch.arange(ids.numel()), log_p, 1.0)


def taught(model: PreTrainedModel, student: Student, steps: int = 3) -> None:
    """Prunes and trains ``model``."""
    prune(model, [IDS], student.recipe)
    if student.recovery is not None:
        student.recovery.attach(model)
    given = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(given, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


STUDENTS = {
    "LoRA": Student(Recipe(), LoRA()),
    "MaskedLoRA, some linears": Student(Recipe(targets=["up_proj"]), MaskedLoRA(target_modules=["q_proj", "up_proj"])),
    "FullFineTuning": Student(Recipe(), FullFineTuning()),
    "SparseGPT": Student(Recipe(SparseGPT()), LoRA()),
    "gradual": Student(Recipe(), MaskedLoRA(), (0, 3)),
    "QLoRA": Student(Recipe(), QLoRA(quantization="int8")),
    "slices": Student(Recipe(Slicing(), 0.25, Uniform()), None),
}


def refused(teacher: Teacher, student: Student) -> bool:
    try:
        teacher.check(student)
    except InputError:
        return True
    return False


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("teacher", [*EXACT, *ROUGH], ids=str)
def test_it_says_what_the_dense_model_says(teacher: Teacher, name: str) -> None:
    student, model = STUDENTS[name], small_model()
    if refused(teacher, student):
        pytest.skip("is refused")
    dense = model(IDS).logits.detach().flatten(0, 1).log_softmax(-1)
    teaching = kept(teacher, model, student)
    taught(model, student)
    assert (model(IDS).logits.flatten(0, 1).log_softmax(-1) - dense).abs().max() > 0.2
    found = says(teaching, model)
    assert not found.requires_grad
    if teacher in EXACT:
        assert torch.equal(found, dense)
    else:
        known = dense.topk(getattr(teacher, "k", 64), -1).indices
        assert 0 < (found - dense).gather(-1, known).abs().max() < ROUGH[teacher]
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(IDS.numel()), atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(family: str) -> None:
    student, model = Student(Recipe(Magnitude(), 0.5, Uniform()), LoRA()), small_model(family)
    dense = model(IDS).logits.detach().flatten(0, 1).log_softmax(-1)
    teaching = kept(SparseDelta(), model, student)
    taught(model, student, steps=1)
    assert torch.equal(says(teaching, model), dense)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_four_bits_of_matrices_that_are_no_linears(family: str) -> None:
    student, model = Student(Recipe(Magnitude(), 0.5, Uniform()), LoRA()), small_model(family)
    dense = model(IDS).logits.detach().flatten(0, 1).log_softmax(-1)
    teaching = kept(Copy("nf4"), model, student)
    taught(model, student, steps=1)
    assert 0 < (says(teaching, model) - dense).abs().max() < 0.5


def test_bytes_that_are_kept() -> None:
    model, beside = small_model(), STUDENTS["LoRA"]
    linears = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    every = sum(p.numel() for p in model.parameters())
    assert kept(Copy(), model, beside).size_bytes() == 4 * linears
    assert kept(Copy(), model, STUDENTS["FullFineTuning"]).size_bytes() == 4 * every
    assert kept(Copy("bfloat16"), model, beside).size_bytes() == 2 * every
    assert kept(Copy("nf4"), model, beside).size_bytes() == linears // 2 + 4 * linears // 64
    assert kept(TopK(8), model, beside).size_bytes() == IDS.numel() * 8 * 6
    teaching = kept(SparseDelta(), model, beside)
    taught(model, beside)
    says(teaching, model)
    assert teaching.size_bytes() == pytest.approx(2 * linears, rel=1e-3)


def test_what_is_shared_is_the_students_and_stays_trainable_by_others() -> None:
    model = small_model()
    for teacher in EXACT:
        kept(teacher, model, STUDENTS["LoRA"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    twin = kept(Copy(), model, STUDENTS["LoRA"]).model  # type: ignore[attr-defined]
    assert twin.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert twin.model.layers[0].mlp.up_proj.weight is not model.model.layers[0].mlp.up_proj.weight
    assert not twin.model.layers[0].mlp.up_proj.weight.requires_grad
    assert not twin.training


def test_a_student_of_two_bytes_is_copied_as_it_is() -> None:
    model = small_model().bfloat16()
    dense = model(IDS).logits.detach().flatten(0, 1)
    for store in ("same", "bfloat16"):
        teaching = kept(Copy(store), model, STUDENTS["LoRA"])
        assert teaching.output({"input_ids": IDS}).logits_NV.dtype == torch.bfloat16  # type: ignore[attr-defined]
        assert torch.equal(teaching.output({"input_ids": IDS}).logits_NV, dense)  # type: ignore[attr-defined]


@pytest.mark.parametrize("store", ["same", "bfloat16", "nf4"])
@pytest.mark.parametrize("name", ["LoRA", "FullFineTuning"])
def test_a_copy_comes_back_from_its_weights_to_the_bit(store: Any, name: str) -> None:
    model, other = small_model(), small_model()
    first = kept(Copy(store), model, STUDENTS[name])
    for parameter in other.parameters():
        if parameter.ndim == 2 and parameter is not other.model.embed_tokens.weight:
            parameter.data.mul_(2)
    again = kept(Copy(store), other, STUDENTS[name], weights=first.weights())
    ids = {"input_ids": IDS}
    assert torch.equal(again.output(ids).logits_NV, first.output(ids).logits_NV)  # type: ignore[attr-defined]


@pytest.mark.parametrize("store", ["bfloat16", "nf4"])
def test_no_second_model_in_full_precision_is_made_on_the_way(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self.numel()) or self)
    model = small_model()
    teaching: Any = kept(Copy(store), model, STUDENTS["FullFineTuning"])
    assert copied == []
    assert not {id(p) for p in teaching.model.parameters()} & {id(p) for p in model.parameters()}
    assert teaching.copied.keys() & teaching.lazy_weights.keys() == set()


def test_windows_are_known_by_their_tokens() -> None:
    model = small_model()
    looked: list[int] = []

    def windows() -> Iterable[dict[str, torch.Tensor]]:
        for rows in ([0, 1], [2], [1, 0]):
            looked.append(len(rows))
            yield {"input_ids": IDS[rows], "attention_mask": torch.ones_like(IDS[rows])}

    teaching = kept(TopK(5), model, STUDENTS["LoRA"], windows=windows())
    expected = model(IDS).logits.log_softmax(-1).topk(5, -1)
    for rows in ([2, 0], [1]):
        output: Any = teaching.output({"input_ids": IDS[rows]})
        assert torch.equal(output.tokens_NK, expected.indices[rows].flatten(0, 1))
        torch.testing.assert_close(output.log_q_NK, expected.values[rows].flatten(0, 1), rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="must not be TopK if the training dataloader gives other windows"):
        teaching.output({"input_ids": IDS.flip(1)})
    mask = torch.ones_like(IDS)
    mask[:, -1] = 0
    with pytest.raises(InputError, match="gives other windows"):
        teaching.output({"input_ids": IDS, "attention_mask": mask})
    teaching.output({"input_ids": IDS, "position_ids": torch.arange(16)[None]})
    with pytest.raises(InputError, match="gives other windows"):
        teaching.output({"input_ids": IDS, "position_ids": torch.arange(1, 17)[None]})
    with pytest.raises(
        InputError, match="if the LLM is called with cache_position, which its outputs were computed without"
    ):
        teaching.output({"input_ids": IDS, "cache_position": torch.arange(16)})


def padded(rows: list[torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids = torch.nn.functional.pad(ids, (0, pad))
    mask = torch.stack([torch.arange(ids.shape[1]) < len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def test_padded_windows_are_known_whatever_they_share_a_batch_with() -> None:
    """As conversations, which are padded to the longest of their batch: in another epoch to another length."""
    model, rows = small_model(), [IDS[0, :5], IDS[1, :9], IDS[2, :9]]
    teaching = kept(TopK(64), model, STUDENTS["LoRA"], windows=[padded(rows[:2], 0), padded(rows[2:], 2)])
    assert teaching.size_bytes() == (5 + 9 + 9) * 64 * 6
    log_p = torch.randn(2 * 12, 64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    output = teaching.output(padded([rows[2], rows[0]], 3))
    found = output.log_q(torch.arange(24), log_p, 1.0).unflatten(0, (2, 12))
    for row, said in ((rows[2], found[0]), (rows[0], found[1])):
        expected = model(row[None]).logits[0].log_softmax(-1)
        torch.testing.assert_close(said[: len(row)], expected, rtol=1e-3, atol=4e-3)
    assert torch.equal(found[0, 9:], log_p[9:12])  # nothing is said of padding
    assert torch.equal(found[1, 5:], log_p[17:])


def test_packed_windows_are_known_by_their_positions_too() -> None:
    model, positions = small_model(), torch.cat([torch.arange(6), torch.arange(10)])[None]
    packed = {"input_ids": IDS[:1], "position_ids": positions}
    teaching = kept(TopK(64), model, STUDENTS["LoRA"], windows=[packed])
    expected = model(**packed, use_cache=False).logits[0].log_softmax(-1)
    assert (expected - model(IDS[:1]).logits[0].log_softmax(-1)).abs().max() > 0.01
    assert (says(teaching, model, IDS[:1], position_ids=positions) - expected).abs().max() < 4e-3
    with pytest.raises(InputError, match="gives other windows"):
        teaching.output({"input_ids": IDS[:1]})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("SparseGPT", "SparseGPT changes weights that it does not remove"),
        ("slices", "Slicing changes weights that it does not remove"),
        ("QLoRA", r"`pruning.recovery` QLoRA\(.*\) does not leave the weights as they are"),
        ("FullFineTuning", r"`pruning.recovery` FullFineTuning\(\) does not leave the weights as they are"),
        ("gradual", "it supports a single cut, at step 0, and there are cuts at 0, 3"),
    ],
)
def test_removed_weights_that_could_not_be_put_back(name: str, why: str) -> None:
    with pytest.raises(
        InputError, match=f"`pruning.distillation.teacher` must not be SparseDelta here, {why}.*: use Copy"
    ):
        SparseDelta().check(STUDENTS[name])


def test_words_are_looked_up_at_step_0_alone() -> None:
    with pytest.raises(InputError, match="must not be TopK if the first cut comes after step 0, .* a cut at 5"):
        TopK().check(Student(Recipe(), LoRA(), (5,)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(temperature=0), "`pruning.distillation.temperature` must be above 0, got 0"),
        (
            lambda: Distillation(weight=0),
            r"`pruning.distillation.weight` must be in \(0, 1\].*, got 0; to train without",
        ),
        (lambda: Distillation(weight=1.5), r"`pruning.distillation.weight` must be in \(0, 1\].*, got 1.5"),
        (lambda: TopK(0), "`TopK.k` must be at least 1, .*got 0"),
        (lambda: Copy("int3"), "`Copy.store` must be one of same, bfloat16, nf4, got 'int3'"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def student_and_teacher(**fields: Any) -> tuple[PreTrainedModel, PreTrainedModel, DistillationHook]:
    model, dense = small_model(), small_model()
    distilled = DistillationHook(Distillation(**fields), kept(Copy(), model, STUDENTS["LoRA"]))
    prune(model, [IDS], Recipe(Wanda(), 0.7))
    distilled.register(model)
    return model, dense, distilled


def test_the_loss_and_its_gradient_are_the_mixture_over_the_positions_that_the_cross_entropy_counts() -> None:
    model, dense, distilled = student_and_teacher(temperature=2.0, weight=0.25)
    labels = IDS.clone()
    labels[0, :5] = labels[1, 9:] = -100
    loss = model(IDS, labels=labels).loss
    (found,) = torch.autograd.grad(loss, model.model.norm.weight)
    logits = model(IDS).logits
    counted = labels[:, 1:] != -100
    log_p = (logits[:, :-1][counted] / 2).log_softmax(-1)
    log_q = (dense(IDS).logits[:, :-1][counted] / 2).log_softmax(-1).detach()
    cross = torch.nn.functional.cross_entropy(logits[:, :-1][counted], labels[:, 1:][counted])
    divergence = 4 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    expected = 0.75 * cross + 0.25 * divergence
    (by_torch,) = torch.autograd.grad(expected, model.model.norm.weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, by_torch)
    torch.testing.assert_close(distilled.losses, {"cross_entropy": cross.detach(), "distillation": divergence.detach()})


def test_padding_is_the_same_as_its_absence() -> None:
    model, _, distilled = student_and_teacher(weight=1.0)
    short = model(IDS[:1, :10], labels=IDS[:1, :10]).loss
    padded, mask = IDS[:1].clone(), torch.ones_like(IDS[:1])
    mask[:, 10:] = padded[:, 10:] = 0
    labels = padded.masked_fill(mask == 0, -100)
    long = model(input_ids=padded, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(long, short, rtol=1e-4, atol=0)  # sums of another order over logits nearly alike
    torch.testing.assert_close(short, distilled.losses["distillation"], rtol=1e-4, atol=0)


def test_labels_that_are_shifted_already_and_a_count_of_ones_own() -> None:
    model, *_ = student_and_teacher(weight=1.0)
    mean = model(IDS, labels=IDS).loss
    shifted = torch.cat([IDS[:, 1:], torch.full((3, 1), -100)], 1)
    torch.testing.assert_close(model(IDS, labels=IDS, shift_labels=shifted).loss, mean)
    summed = model(IDS, labels=IDS, num_items_in_batch=torch.tensor(5)).loss
    torch.testing.assert_close(summed, mean * 45 / 5)


def test_only_a_loss_that_is_trained_on_is_another() -> None:
    model, dense, distilled = student_and_teacher(weight=1.0)
    model.train()
    with torch.no_grad():
        assert model(IDS, labels=IDS).loss > 3
    assert model(IDS).loss is None
    assert distilled.losses == {}
    assert model(IDS, labels=IDS).loss < 1
    assert dense(IDS, labels=IDS).loss > 3


@pytest.mark.parametrize("fields", [{"return_dict": False}, {"logits_to_keep": 4, "shift_labels": IDS[:, :4].clone()}])
def test_logits_that_cannot_be_seen(fields: dict[str, Any]) -> None:
    model, *_ = student_and_teacher()
    with pytest.raises(InputError, match="must see the logits of all positions: .* `return_dict=False` and `logits_to"):
        model(IDS, labels=IDS, **fields)

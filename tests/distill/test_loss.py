"""The divergence, worked by hand and against plain torch."""

import math

import pytest
import torch
from torch.nn import functional as F

from lit_prune.distill import loss
from lit_prune.distill.loss import divergence
from lit_prune.distill.teacher_model import Logits
from lit_prune.distill.top_k import TopKOutput

EVERY = torch.ones(1, dtype=torch.bool)


def test_by_hand() -> None:
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    # q = (1/2, 1/2), p = (1/4, 3/4): 1/2 log 2 + 1/2 log (2/3)
    assert divergence(student, EVERY, Logits(teacher), 1.0).item() == pytest.approx(0.5 * math.log(4 / 3))
    # at T = 2 the student says (1, sqrt 3) / (1 + sqrt 3)
    p = 1 / (1 + math.sqrt(3))
    expected = 4 * 0.5 * (math.log(0.5 / p) + math.log(0.5 / (1 - p)))
    assert divergence(student, EVERY, Logits(teacher), 2.0).item() == pytest.approx(expected, rel=1e-5)


def plain(student_NV: torch.Tensor, teacher_NV: torch.Tensor, counted_N: torch.Tensor, t: float) -> torch.Tensor:
    """The loss by torch, all positions at once."""
    log_p, log_q = F.log_softmax(student_NV / t, -1), F.log_softmax(teacher_NV / t, -1)
    return t**2 * F.kl_div(log_p[counted_N], log_q[counted_N], reduction="sum", log_target=True)


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 11, 7, generator=random) * 3
    counted = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1], dtype=torch.bool)
    return student.requires_grad_(), teacher, counted


@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_value_and_gradient_are_those_of_plain_torch_in_chunks_of_any_size(
    logits: tuple[torch.Tensor, ...], chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, counted = logits
    monkeypatch.setattr(loss, "rows_at_once", lambda logits: chunk)
    expected = plain(student, teacher, counted, temperature)
    (by_torch,) = torch.autograd.grad(expected * 0.3, student)
    found = divergence(student, counted, Logits(teacher), temperature)
    (by_hand,) = torch.autograd.grad(found * 0.3, student)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(by_hand, by_torch)
    assert (by_hand[~counted] == 0).all()


def test_no_more_than_a_chunk_is_looked_at_at_once(
    logits: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, counted = logits
    monkeypatch.setattr(loss, "rows_at_once", lambda logits: 2)
    seen: list[int] = []
    ask = Logits.log_q

    def log_q(self: Logits, rows: torch.Tensor, log_p: torch.Tensor, temperature: float) -> torch.Tensor:
        seen.append(len(rows))
        return ask(self, rows, log_p, temperature)

    monkeypatch.setattr(Logits, "log_q", log_q)
    divergence(student, counted, Logits(teacher), 1.0)
    assert seen == [2, 2, 2, 1]


def test_in_half_precision_it_is_summed_in_float32(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher, counted = logits
    half = student.detach().bfloat16().requires_grad_()
    found = divergence(half, counted, Logits(teacher.bfloat16()), 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(half.float(), teacher.bfloat16().float(), counted, 1.0))
    (grad,) = torch.autograd.grad(found, half)
    assert grad.dtype == torch.bfloat16


def test_a_word_that_the_teacher_never_says() -> None:
    teacher = torch.tensor([[0.0, -torch.inf, 0.0]])
    student = torch.zeros(1, 3, requires_grad=True)
    found = divergence(student, EVERY, Logits(teacher), 1.0)
    found.backward()
    assert found.item() == pytest.approx(math.log(1.5))
    torch.testing.assert_close(student.grad, torch.tensor([[-1 / 6, 1 / 3, -1 / 6]]))


def top(teacher: torch.Tensor, k: int, temperature: float) -> TopKOutput:
    found = F.log_softmax(teacher / temperature, -1).topk(k, -1)
    return TopKOutput(found.indices, found.values)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_of_the_likeliest_words_and_the_rest_as_one(logits: tuple[torch.Tensor, ...], temperature: float) -> None:
    student, teacher, counted = logits
    found = divergence(student, counted, top(teacher, 3, temperature), temperature)
    (by_hand,) = torch.autograd.grad(found, student)
    q, p = (F.softmax(x / temperature, -1) for x in (teacher, student))
    words = teacher.topk(3, -1).indices
    q_4, p_4 = (torch.cat([kept := x.gather(-1, words), 1 - kept.sum(-1, keepdim=True)], -1) for x in (q, p))
    expected = temperature**2 * (q_4 * (q_4 / p_4).log())[counted].sum()
    (by_torch,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(by_hand, by_torch, rtol=1e-4, atol=1e-5)
    assert found < plain(student, teacher, counted, temperature)


def test_of_all_words_it_is_the_whole_divergence(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher, counted = logits
    found = divergence(student, counted, top(teacher, 7, 2.0), 2.0)
    torch.testing.assert_close(found, plain(student, teacher, counted, 2.0))

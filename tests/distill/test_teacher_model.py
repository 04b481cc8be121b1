"""Contract of every teacher: the output of the dense model, whatever becomes of the student, and the bytes it takes."""

import pytest
import torch

from lit_prune.distill import Copy, SparseDelta, Student, Teacher, TopK
from lit_prune.errors import InputError
from tests.conftest import small_model
from tests.distill.cases import IDS, STUDENTS, kept, says, taught

EXACT = [Copy(), SparseDelta()]
ROUGH = {Copy("bfloat16"): 0.05, Copy("nf4"): 0.6, TopK(64): 0.004, TopK(32): 0.004}  # greatest difference of log q


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

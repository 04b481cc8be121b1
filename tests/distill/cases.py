"""Students, and what their teachers say of one batch."""

from typing import Any

import torch
from transformers import PreTrainedModel

from lit_prune.allocate import Uniform
from lit_prune.distill import DenseModel, Student, Teacher, TeacherState
from lit_prune.pipeline import prune
from lit_prune.pruning import SparseGPT
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA
from lit_prune.slice import Slicing

CPU = torch.device("cpu")
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

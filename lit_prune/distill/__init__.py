"""Distillation from the dense model, and its teachers; importing them here makes their short names resolve."""

from lit_prune.distill.base import DenseModel, Student, Teacher, TeacherOutput, TeacherState
from lit_prune.distill.copies import Copy
from lit_prune.distill.distillation import Distillation
from lit_prune.distill.hook import DistillationHook
from lit_prune.distill.loss import divergence
from lit_prune.distill.sparse_delta import SparseDelta
from lit_prune.distill.top_k import TopK

__all__ = [
    "Copy",
    "DenseModel",
    "Distillation",
    "DistillationHook",
    "SparseDelta",
    "Student",
    "Teacher",
    "TeacherOutput",
    "TeacherState",
    "TopK",
    "divergence",
]

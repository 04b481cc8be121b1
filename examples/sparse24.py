"""Tokens per second of a 2:4 model with torch's semi-structured sparse kernels, for CUDA GPUs from Ampere on.

    lit-prune prune --config configs/quickstart_nofm.yaml --format packed --output runs/nofm
    python examples/sparse24.py runs/nofm/model

This was never run on a GPU, since none was available: it promises no speed. On a CPU zeros only save storage.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured
from transformers import AutoModelForCausalLM, PreTrainedModel

import lit_prune  # noqa: F401 (opens packed weights)
from lit_prune.evaluation.speed import tokens_per_second

ROWS, COLUMNS = 32, 64  # torch's kernels for 16-bit weights need multiples of them


def is_two_of_four(weight_OI: Tensor) -> bool:
    """Returns whether at most two of every four consecutive weights of a row are not zero."""
    return weight_OI.shape[1] % 4 == 0 and bool(((weight_OI != 0).view(-1, 4).sum(1) <= 2).all())


def fits(weight_OI: Tensor) -> bool:
    """Returns whether torch has kernels for a 2:4 weight of this shape."""
    return weight_OI.shape[0] % ROWS == 0 and weight_OI.shape[1] % COLUMNS == 0


def sparsify(model: PreTrainedModel) -> int:
    """Replaces the 2:4 weights of ``model``, which is on a GPU, by sparse ones; returns their number."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    suitable = [linear for linear in linears if fits(linear.weight) and is_two_of_four(linear.weight)]
    for linear in suitable:
        linear.weight = nn.Parameter(to_sparse_semi_structured(linear.weight.detach()), requires_grad=False)
    return len(suitable)


@torch.no_grad()
def main(folder: str) -> None:
    """Prints the speed of the dense and of the sparse model, and how far their logits are apart."""
    if not torch.cuda.is_available():
        sys.exit("A CUDA GPU is needed: torch has no kernels for 2:4 on this machine, where zeros only save storage.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    ids = torch.arange(128, device="cuda")[None]
    logits = model(ids).logits
    print(f"dense: {tokens_per_second(model)}")
    count = sparsify(model)
    print(f"{count} sparse linears: {tokens_per_second(model)}")
    print(f"largest difference of a logit: {(model(ids).logits - logits).abs().max():.3g} of {logits.abs().max():.3g}")


if __name__ == "__main__":
    main(sys.argv[1])

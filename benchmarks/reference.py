"""Reference implementations of Magnitude, Wanda, SparseGPT and DLP, without shared work or optimisations.

`forwards.py` compares lit_prune with them in speed, masks and perplexity. They are written from the papers (arXiv
2306.11695 section 3; arXiv 2301.00774 algorithm 1; arXiv 2505.23807 section 3.2) and work as the papers' experiments
do: one linear at a time, with full sorts; every block runs twice over the stored activations, once with hooks on every
linear and once after it is pruned; DLP scores in a pass of its own, which again runs every block twice. They support
models laid out like Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.allocate import DLP
from lit_prune.allocate.base import allocate
from lit_prune.calibration.windows import Batch

Name = Literal["Magnitude", "Wanda", "SparseGPT"]
SPAN = 128
DAMPING = 0.01


class Squares:
    """Mean square of every input channel."""

    def __init__(self, columns: int) -> None:
        self.sum_I, self.tokens = torch.zeros(columns), 0

    def add(self, x_BTI: Tensor) -> None:
        """Adds a batch."""
        x_PI = x_BTI.flatten(0, -2).float()
        self.sum_I += x_PI.square().sum(0)
        self.tokens += len(x_PI)

    def norm(self) -> Tensor:
        """Returns the root mean square."""
        return (self.sum_I / self.tokens).sqrt()


class Hessian:
    """Mean of 2 x x^T."""

    def __init__(self, columns: int) -> None:
        self.mean_II, self.tokens = torch.zeros(columns, columns), 0

    def add(self, x_BTI: Tensor) -> None:
        """Adds a batch to the running mean."""
        x_IP = x_BTI.flatten(0, -2).float().T
        self.mean_II *= self.tokens / (self.tokens + x_IP.shape[1])
        self.tokens += x_IP.shape[1]
        x_IP = x_IP * (2 / self.tokens) ** 0.5
        self.mean_II += x_IP @ x_IP.T


@torch.no_grad()
def prune(model: PreTrainedModel, batches: Sequence[Batch], name: Name, sparsity: float, *, dlp: bool) -> None:
    """Prunes ``model`` in place, with the rates of DLP or the same rate for every block."""
    model.eval()
    layers = model.model.layers
    rates = dlp_rates(model, batches, sparsity) if dlp else [sparsity] * len(layers)
    hidden, arguments = first_inputs(model, batches)
    for layer, rate in zip(layers, rates, strict=True):
        kind = {"Magnitude": None, "Wanda": Squares, "SparseGPT": Hessian}[name]
        if kind is None:
            for linear in linears(layer):
                linear.weight.data = magnitude(linear.weight.data, rate)
            continue
        statistics = collect(layer, hidden, arguments, kind)
        for linear in linears(layer):
            work = wanda if name == "Wanda" else sparsegpt
            linear.weight.data = work(linear.weight.data, statistics[linear], rate)
        hidden = [layer(x_BTD, **arguments) for x_BTD in hidden]


def dlp_rates(model: PreTrainedModel, batches: Sequence[Batch], sparsity: float) -> list[float]:
    """Returns the rate of every block from the median of its |W| * ||X||, computed in a pass of its own."""
    hidden, arguments = first_inputs(model, batches)
    scores, sizes = [], []
    for layer in model.model.layers:
        statistics = collect(layer, hidden, arguments, Squares)
        every = torch.cat([(linear.weight.abs() * statistics[linear].norm()).flatten() for linear in linears(layer)])
        scores.append(float(every.median()))
        sizes.append(len(every))
        hidden = [layer(x_BTD, **arguments) for x_BTD in hidden]
    return allocate(DLP(), scores, sparsity, sizes=sizes)


def first_inputs(model: PreTrainedModel, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Any]]:
    """Returns the input of the first block for every batch, and its other arguments; all batches have one shape."""
    hidden = [model.model.embed_tokens(batch["input_ids"]) for batch in batches]
    positions = torch.arange(hidden[0].shape[1])[None]
    return hidden, {"position_embeddings": model.model.rotary_emb(hidden[0], positions), "attention_mask": None}


def linears(layer: nn.Module) -> list[nn.Linear]:
    """Returns the linears of a block."""
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def collect(
    layer: nn.Module, hidden: Sequence[Tensor], arguments: dict[str, Any], kind: Callable[[int], Any]
) -> dict[nn.Linear, Any]:
    """Returns the statistics of every linear of a block, each collected separately."""
    statistics = {linear: kind(linear.in_features) for linear in linears(layer)}
    hooks = [
        linear.register_forward_pre_hook(lambda module, args: statistics[module].add(args[0]))
        for linear in linears(layer)
    ]
    for x_BTD in hidden:
        layer(x_BTD, **arguments)
    for hook in hooks:
        hook.remove()
    return statistics


def magnitude(weight_OI: Tensor, rate: float) -> Tensor:
    """Returns ``weight_OI`` without its smallest entries."""
    order = weight_OI.abs().flatten().sort().indices
    return _without(weight_OI, order[: round(weight_OI.numel() * rate)])


def wanda(weight_OI: Tensor, squares: Squares, rate: float) -> Tensor:
    """Returns ``weight_OI`` without the smallest |W| * ||X|| of every row, round(numel * rate) in total."""
    score_OI = weight_OI.abs() * squares.norm()
    each, more = divmod(round(weight_OI.numel() * rate), len(weight_OI))
    rising_OI, order_OI = score_OI.sort(dim=1)
    pruned_OI = weight_OI.scatter(1, order_OI[:, :each], 0)
    if more:
        rows = rising_OI[:, each].sort().indices[:more]
        pruned_OI[rows, order_OI[rows, each]] = 0
    return pruned_OI


def sparsegpt(weight_OI: Tensor, hessian: Hessian, rate: float) -> Tensor:
    """Returns ``weight_OI`` pruned column by column, with the remaining weights updated (algorithm 1)."""
    weight_OI, hessian_II = weight_OI.clone().float(), hessian.mean_II
    dead = hessian_II.diagonal() == 0
    hessian_II[dead, dead] = 1
    weight_OI[:, dead] = 0
    hessian_II.diagonal().add_(DAMPING * hessian_II.diagonal().mean())
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    upper_II = torch.linalg.cholesky(inverse_II, upper=True)
    left, columns = round(weight_OI.numel() * rate), weight_OI.shape[1]
    for begin in range(0, columns, SPAN):
        end = min(begin + SPAN, columns)
        w_OS, u_SS = weight_OI[:, begin:end].clone(), upper_II[begin:end, begin:end]
        error_OS = torch.zeros_like(w_OS)
        count = round(left * w_OS.numel() / weight_OI[:, begin:].numel())
        cost_OS = w_OS.square() / u_SS.diagonal().square()
        keep_OS = _without(torch.ones_like(w_OS), cost_OS.flatten().sort().indices[:count]).bool()
        left -= count
        for s in range(end - begin):
            pruned_O = w_OS[:, s] * keep_OS[:, s]
            error_O = (w_OS[:, s] - pruned_O) / u_SS[s, s]
            w_OS[:, s:] -= error_O[:, None] * u_SS[s, s:]
            w_OS[:, s], error_OS[:, s] = pruned_O, error_O
        weight_OI[:, begin:end] = w_OS
        weight_OI[:, end:] -= error_OS @ upper_II[begin:end, end:]
    return weight_OI


def _without(weight_OI: Tensor, indices: Tensor) -> Tensor:
    flat = weight_OI.flatten().clone()
    flat[indices] = 0
    return flat.view_as(weight_OI)

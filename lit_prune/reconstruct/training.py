"""The training of one block towards its targets.

The parameters that are trained are copies in float32, whatever the type of the block's own. With several processes each
step adds up the gradients of one batch from each process, so that all processes make the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call

from lit_prune import distributed
from lit_prune.calibration.stream import Stream
from lit_prune.masks.zeros import cast
from lit_prune.models.families import Block
from lit_prune.models.linears import linears_of
from lit_prune.reconstruct.losses import relative_errors
from lit_prune.reconstruct.settings import Reconstruct

BETAS = (0.9, 0.95)


class BlockTraining:
    """The training of one block on the batches of a stream.

    Args:
        settings: The settings.
        stream: The stream in front of the block.
        block: The block, cut, on the stream's device.
        targets: The output that the block should have, for every batch.
    """

    def __init__(self, settings: Reconstruct, stream: Stream, block: Block, targets: Sequence[Tensor]) -> None:
        self.settings, self.stream, self.block, self.targets = settings, stream, block, targets
        self.weights = {
            name: parameter.detach().to(torch.float32, copy=True).requires_grad_()
            for name, parameter in block.module.named_parameters()
        }
        self._buffers = {name: _float32(buffer) for name, buffer in block.module.named_buffers()}
        self._zeros = _zeros_of_linears(block.module)

    def run(self, batches: Sequence[int]) -> dict[str, Tensor]:
        """Trains on the ``batches`` of this process, and returns the new values of the parameters by name."""
        masters = list(self.weights.values())
        optimizer = torch.optim.AdamW(
            masters, lr=self.settings.lr, betas=BETAS, weight_decay=self.settings.weight_decay
        )
        rounds = max(distributed.all_gather(len(batches)))
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=0.0, total_iters=self.settings.epochs * rounds
        )
        for index in self._order(batches, rounds):
            self._set_gradients(index)
            nn.utils.clip_grad_norm_(masters, self.settings.max_norm)
            optimizer.step()
            schedule.step()
        return {name: self._trained(name, optimizer) for name in self.weights}

    def _order(self, batches: Sequence[int], rounds: int) -> Iterator[int | None]:
        """Yields the batch of every step; None if this process has no batch left in the last round of an epoch."""
        generator = torch.Generator().manual_seed(self.settings.seed + self.block.index)
        for _ in range(self.settings.epochs):
            yield from (batches[number] for number in torch.randperm(len(batches), generator=generator))
            yield from [None] * (rounds - len(batches))

    def _set_gradients(self, index: int | None) -> None:
        """Gives the weights the gradients of the mean loss of a token of the step's batches, 0 for pruned weights."""
        gradients = _summed(self._gradients(index))
        for (name, master), gradient in zip(self.weights.items(), gradients, strict=True):
            master.grad = gradient if name not in self._zeros else gradient.masked_fill_(self._zeros[name], 0)

    @torch.enable_grad()
    def _gradients(self, index: int | None) -> Sequence[Tensor]:
        """Returns the share of a batch in the gradients of a step; 0 without a batch."""
        masters = list(self.weights.values())
        if index is None:
            distributed.all_reduce_sum(torch.zeros(()))  # as the other processes do
            return [torch.zeros_like(master) for master in masters]
        y_BTD = self.stream.output(index, self.block, self._forward)
        target_BTD = self.targets[index].to(self.stream.device)
        total, tokens = relative_errors(y_BTD, target_BTD, self.stream.masks[index])
        loss = total / distributed.all_reduce_sum(tokens.float())
        return torch.autograd.grad(loss, masters, materialize_grads=True)

    def _forward(self, x_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the block's output with the weights that are trained, all in float32."""
        args, kwargs = apply_to_collection((args, kwargs), Tensor, _float32)
        return functional_call(self.block.module, self.weights | self._buffers, (x_BTD.float(), *args), kwargs)

    def _trained(self, name: str, optimizer: torch.optim.Optimizer) -> Tensor:
        """Returns the new values of a parameter in its type; a weight that had no gradient has kept its value."""
        original, master = self.block.module.get_parameter(name).detach(), self.weights[name]
        has_gradient = optimizer.state[master]["exp_avg_sq"] != 0  # an expert without tokens has none
        return torch.where(has_gradient, cast(master.detach(), original != 0, original.dtype), original)


def _summed(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the sums of the ``gradients`` over all processes."""
    if distributed.world_size() == 1:
        return gradients
    flat = distributed.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def _zeros_of_linears(layer: nn.Module) -> dict[str, Tensor]:
    """Returns the masks of zeros of all parameters that hold linears, by name."""
    linears = {id(linear.parameter) for linear in linears_of(layer).values()}
    return {name: parameter.detach() == 0 for name, parameter in layer.named_parameters() if id(parameter) in linears}


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor

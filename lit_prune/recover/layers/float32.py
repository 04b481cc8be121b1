"""Training in float32 inside a model in half precision: linears that stay in float32, and AdamW with master weights.

bfloat16 has 8 bits of precision: an update below 1/512 of a weight is lost in rounding, and nearly all updates of
fine-tuning are smaller. float16 has 11 bits, and the squares of gradients below 1e-4 underflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_step

HALF = (torch.float16, torch.bfloat16)


@final
class Float32Linear(nn.Linear):
    """An ``nn.Linear`` whose floating-point parameters stay in float32 (or float64) when the model is cast.

    Lightning's `precision: bf16-true` and `16-true` cast the whole module right before the first step, which would undo
    an earlier cast of the parameters, and round the values that a resumed run has restored.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Returns a linear with the parameters of ``linear``, cast to float32 (float64 is kept)."""
        with torch.device("meta"):
            float32_linear = cls(linear.in_features, linear.out_features, linear.bias is not None)
        for name, parameter in linear.named_parameters():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            setattr(float32_linear, name, nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad))
        return float32_linear.train(linear.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_type(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype in (torch.float32, torch.float64) else tensor.to(moved.device)

        return super()._apply(keep_type, recurse)


def adamw(groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Returns torch's AdamW over parameter groups, or :class:`MasterAdamW` if any parameter is in half precision."""
    groups = list(groups)
    half = any(parameter.dtype in HALF for group in groups for parameter in group["params"])
    return (MasterAdamW if half else torch.optim.AdamW)(groups, lr=lr, betas=betas)


@final
class MasterAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose moments and master weights are in float32, whatever the parameters' type.

    A step updates the master weight and rounds it to the parameter (Mixed Precision Training, arXiv 1710.03740). It
    takes 12 bytes per parameter beside the parameter and its gradient, 16 in all, as many as training in float32.
    A bfloat16 weight of 1 stays 1 under steps of -0.001 of plain AdamW, and is 0.996 here after four of them.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Coefficients of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step, and returns the loss of ``closure``; None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:  # one at a time: float32 copies of all gradients never exist together
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            master = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
            state |= {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
            if parameter.dtype in HALF:
                state["master"] = master
        master = state.get("master", parameter)
        if master is not parameter:
            # something else, such as a cut, may have changed the parameter since: where they differ, it is right
            master.copy_(torch.where(master.to(parameter.dtype) == parameter, master, parameter))
        adamw_step(
            [master],
            [parameter.grad.to(master.dtype)],  # type: ignore[union-attr]
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if master is not parameter:
            parameter.copy_(master)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state in float32; torch.optim.Optimizer casts it to the type of the parameter."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if key != "step" and isinstance(value, Tensor):
                    self.state[parameter][key] = value.to(parameter.device)

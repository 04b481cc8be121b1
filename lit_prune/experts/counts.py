"""The structure of a model whose mixtures have fewer experts than those of the dense model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, final

from transformers import PreTrainedModel

from lit_prune.experts.mixture import EXPERT_FIELDS, count_experts, expert_fields, keep_experts, mixture_of
from lit_prune.models.structure import Description, Structure
from lit_prune.shrink.units.narrow import adopt_sizes


@final
@dataclass(frozen=True)
class ExpertCounts(Structure):
    """The number of experts, which is the same in all mixtures.

    Attributes:
        experts: Number of experts of every mixture.
        full: Number of experts of every mixture of the dense model.
        path: Dotted path of the list of blocks.
    """

    experts: int
    full: int
    path: str

    def rebuild(self, model: PreTrainedModel) -> None:
        """Removes the last experts of every mixture, as many as the model has more; see :meth:`Structure.rebuild`."""
        layers: Any = model.get_submodule(self.path)
        config = model.config.get_text_config()
        if expert_fields(config, self.experts):
            return
        for index, layer in enumerate(layers):
            mixture = mixture_of(layer, config, index)
            if mixture is not None and mixture.count > self.experts:
                keep_experts(layer, mixture, range(self.experts), config, index)
        self.adopt(model)

    def adopt(self, model: PreTrainedModel) -> None:
        """Records the number of experts in the config, and in those modules that remember it."""
        config: Any = model.config.get_text_config()
        holders: tuple[Any, ...] = (config, model, model.base_model)
        for holder, name in itertools.product(holders, EXPERT_FIELDS):
            if type(getattr(holder, name, None)) is int:
                setattr(holder, name, self.experts)
        for index, layer in enumerate(model.get_submodule(self.path).children()):
            adopt_sizes(layer, config, index)

    def describe(self, model: PreTrainedModel) -> Description:
        """Returns the number of experts and the share that was removed."""
        achieved = (self.full - self.experts) / self.full
        mixtures = sum(count_experts(layer) > 0 for layer in model.get_submodule(self.path).children())
        return Description(
            name="experts",
            facts={"achieved": achieved, "experts": self.experts, "full": self.full, "mixtures": mixtures},
            done="Shrunk",
            outcome=f"each of its {mixtures} mixtures has {self.experts} of its {self.full} experts.",
            rows={
                "experts removed": f"{achieved:.4f}",
                "experts of every mixture": f"{self.experts} of {self.full}, in {mixtures} blocks",
            },
            unit="experts",
            noun="number",
            sizes=(self.experts,) * mixtures,
            full=self.full,
            achieved=achieved,
        )

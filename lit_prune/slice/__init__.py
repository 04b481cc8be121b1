"""Dynamic slicing: the residual stream becomes narrower, by a size of its own for every block."""

from lit_prune.models.modeling_sliced import register
from lit_prune.slice.sizes import sizes_from_rates, sliced_parameters, slices
from lit_prune.slice.slicing import Slicing

__all__ = ["Slicing", "sizes_from_rates", "sliced_parameters", "slices"]

# A model that was made in this process is sliced, and copied by ``AutoModelForCausalLM.from_config``, without ever
# passing ``AutoConfig.from_pretrained``, which registers the classes for those who only open folders.
register()

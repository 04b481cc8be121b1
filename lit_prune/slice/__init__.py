"""Dynamic slicing: every block reads a residual stream of its own, reduced width."""

from lit_prune.models.remote_code.modeling_sliced import register
from lit_prune.slice.sizes import rates_from_sizes, sizes_from_rates, sliced_parameters
from lit_prune.slice.slicing import Slicing

__all__ = ["Slicing", "rates_from_sizes", "sizes_from_rates", "sliced_parameters"]

# ``AutoConfig.from_pretrained`` registers the sliced classes when a folder is opened. A model that is sliced in this
# process, and copied by ``AutoModelForCausalLM.from_config``, never passes there.
register()

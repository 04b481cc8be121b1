"""Shrinking: fewer channels and key/value groups in every block."""

from lit_prune.models.remote_code.modeling_shrunk import register
from lit_prune.shrink.head_groups import HeadGroups
from lit_prune.shrink.mlp_width import MLPWidth
from lit_prune.shrink.shrink import Shrink

__all__ = ["HeadGroups", "MLPWidth", "Shrink"]

# ``AutoConfig.from_pretrained`` registers the shrunk classes when a folder is opened. A model that is shrunk in this
# process, and copied by ``AutoModelForCausalLM.from_config``, never passes there.
register()

"""Prune a large language model while it is being fine-tuned with PyTorch Lightning, and heal it in the same run.

Importing it makes ``AutoModelForCausalLM.from_pretrained`` open the folders of sliced models.
"""

from lit_prune.models.modeling_sliced import register

register()

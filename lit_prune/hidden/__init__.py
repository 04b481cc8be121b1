"""A narrower residual stream: the same dimensions go everywhere."""

from lit_prune.hidden.hidden_width import HiddenWidth

__all__ = ["HiddenWidth"]

"""Opens packed folders by transformers' ``from_pretrained``, as a quantiser whose weights are dense once loaded.

The loaded model is an ordinary one, which can be trained, pruned and saved like any other. While it is loaded, one
packed weight at a time is unpacked, so that memory holds the dense model and little else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lit_prune.packed.unpack import BITS, FILE_FIELD, LAYOUT, METHOD, VERSION, check_file, check_version, unpack


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed folder.

    Args:
        version: Version of the layout.
    """

    dequantize = True  # transformers then removes this config from the loaded model

    def __init__(self, version: int = VERSION, **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Checks the files of a packed folder before anything is loaded, and has the weights unpacked while they are."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.serialized_names: dict[str, list[str]] = {}  # until the files are read

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError for a version of the layout that this package does not read."""
        check_version({"version": self.quantization_config.version})  # type: ignore[attr-defined]

    def update_attn_implementation(self, config: Any) -> Any:
        """Returns the config without the entry by which transformers alone says what to install.

        Of the methods that transformers calls before it looks for the files, this one is given the config.
        """
        if hasattr(config, FILE_FIELD):
            delattr(config, FILE_FIELD)
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Checks all files; raises ValueError with the name of the first tensor that is damaged."""
        names = [name for file in kwargs["checkpoint_files"] for name in check_file(Path(file))]
        last_names = {name.rpartition(".")[2] for name in names}
        self.serialized_names = {name: [name, name + BITS, name + LAYOUT] for name in sorted(last_names)}

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Returns the data type in which a stored tensor is loaded: values are converted before they are unpacked."""
        return super().get_new_dtype(None, param, dtype)

    def get_load_operations(self) -> dict[str, Any]:
        """Returns the operation that unpacks."""
        return {"dequantize": Unpack}

    def get_weight_conversions(self) -> list[Any]:
        """Returns the conversions of the weights that the family itself does not convert."""
        return [UnpackingConverter(stored, name, [Unpack(self)]) for name, stored in self.serialized_names.items()]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Returns the family's conversions with unpacking before them, and those of the other weights."""
        updated = super().update_weight_conversions(weight_conversions, model)
        self._conversions = list(zip(weight_conversions, updated, strict=False))
        return updated

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Gives the model the conversions that a dense folder has, by which ``save_pretrained`` writes one."""
        model._weight_conversions = [plain for plain, used in self._conversions if used.was_used()]
        return model

    def is_serializable(self) -> bool:
        """Returns False: the loaded model is dense, and saved as such."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether the loaded model can be trained."""
        return True


class UnpackingConverter(WeightConverter):
    """A conversion that is copied fast: transformers copies it for every stored tensor."""

    __slots__ = ()

    def __deepcopy__(self, memo: Any) -> UnpackingConverter:
        copied = copy(self)
        copied.collected_tensors, copied.layer_targets = defaultdict(list), defaultdict(set)
        return copied


class Unpack(ConversionOps):
    """The operation that unpacks the weights of one parameter, or of each expert of a fused one."""

    def __init__(self, quantiser: PackedQuantizer) -> None:
        self.quantiser = quantiser

    def __deepcopy__(self, memo: Any) -> Unpack:  # transformers copies the operation for every parameter
        return self

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **_: Any,
    ) -> dict[str, Any]:
        """Returns the unpacked weights, by the pattern or the name that they are stored under.

        Args:
            input_dict: Stored tensors by pattern, as lists: several for the experts of a fused parameter.
            source_patterns: All patterns of stored names.
            target_patterns: Patterns of the names in the model.
            full_layer_name: Name of the parameter in the model.
        """
        unpacked = {
            pattern: list(_unpacked(stored, input_dict.get(pattern + BITS, []), input_dict.get(pattern + LAYOUT, [])))
            for pattern, stored in input_dict.items()
            if not pattern.endswith((BITS, LAYOUT))
        }
        only = next(iter(unpacked))
        return {full_layer_name: unpacked[only][0]} if only in self.quantiser.serialized_names else unpacked


def _unpacked(stored: list[Tensor], bits: list[Tensor], layouts: list[Tensor]) -> Iterator[Tensor]:
    """Yields the weights; only packed ones have one dimension, and their bits and layouts come in the same order."""
    places = iter(zip(bits, layouts, strict=True))
    for tensor in stored:
        yield unpack(tensor, *next(places)) if bits and tensor.ndim == 1 else tensor

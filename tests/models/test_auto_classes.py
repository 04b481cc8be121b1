"""The sliced models are known to transformers' Auto classes, from the first use on and not before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from lit_prune.models.remote_code.modeling_sliced import SLICED

IMPORTS = {
    "before": "import lit_prune, sys; assert not {'torch', 'transformers'} & set(sys.modules)\n"
    "from transformers import AutoConfig",
    "after": "from transformers import AutoConfig; import lit_prune, sys",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_a_sliced_config_opens_whichever_package_is_imported_first(order: str, tmp_path: Path) -> None:
    fields = {"model_type": "sliced_llama", "slice_sizes": [8, 8], "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    program = f"""{IMPORTS[order]}
assert "lit_prune.models.remote_code.modeling_sliced" not in sys.modules
original = AutoConfig.__dict__["from_pretrained"]
for _ in range(2):
    print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)
assert AutoConfig.__dict__["from_pretrained"] is not original, "the wrapper stays"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SlicedLlamaConfig"] * 2


def test_the_auto_classes_know_every_family() -> None:
    for family, kind in SLICED.items():
        config = AutoConfig.for_model(f"sliced_{family}", slice_sizes=[8, 8], num_hidden_layers=1)
        assert isinstance(config, kind.config_class)

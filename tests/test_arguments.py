"""What the command line leaves open."""

import pytest
from jsonargparse import Namespace

from lit_prune.arguments import check_verb, fill_lengths
from lit_prune.errors import InputError


def test_a_length_that_is_left_open_is_what_the_model_takes() -> None:
    def filled(**model: object) -> tuple[int, int]:
        fields = {"pretrained": "embedded", "architecture": None} | model
        config = Namespace(model=Namespace(**fields), data=Namespace(seq_length=None))
        config["pruning.calibration.seq_length"] = None
        fill_lengths(config)
        return config.data.seq_length, config.pruning.calibration.seq_length

    assert filled() == (512, 512)
    long = {"model_type": "llama", "max_position_embeddings": 4096}
    assert filled(architecture=long) == (1024, 2048)
    given = Namespace(data=Namespace(seq_length=4096), pruning=Namespace(calibration=Namespace(seq_length=8)))
    fill_lengths(given)
    assert (given.data.seq_length, given.pruning.calibration.seq_length) == (4096, 8)


def test_tasks_are_for_verbs_that_ask_them() -> None:
    verbs = {"fit": set(), "score": set(), "evaluate": set()}
    for args in (
        ["fit", "--tasks", "piqa"],
        ["evaluate", "--tasks=piqa"],
        ["score", "--config=run.yaml"],
        ["none"],
        [],
    ):
        check_verb(args, verbs)
    with pytest.raises(InputError, match="`tasks` must be left out for score, which asks none"):
        check_verb(["score", "--tasks=piqa"], verbs)

from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lit_prune.callbacks.best_scores import reset_best_scores


def test_what_was_best_before_a_cut_is_forgotten_and_no_file_is(tmp_path: Path) -> None:
    (tmp_path / "best.ckpt").write_text("x")
    path, inf = str(tmp_path / "best.ckpt"), torch.tensor(torch.inf)
    low, high = ModelCheckpoint(tmp_path, monitor="x"), ModelCheckpoint(tmp_path, monitor="x", mode="max")
    plain, stopping = ModelCheckpoint(tmp_path), EarlyStopping("x")
    for checkpoint in (low, high, plain):
        checkpoint.best_model_path = checkpoint.kth_best_model_path = path
        checkpoint.best_k_models = {path: torch.tensor(1.0)}
        checkpoint.best_model_score = checkpoint.current_score = checkpoint.kth_value = torch.tensor(1.0)
    stopping.wait_count, stopping.best_score = 2, torch.tensor(1.0)
    reset_best_scores(SimpleNamespace(callbacks=[low, high, plain, stopping]))  # type: ignore[arg-type]
    for checkpoint, worst in ((low, inf), (high, -inf)):
        state = checkpoint.state_dict()
        assert (state["best_model_score"], state["current_score"], state["best_k_models"]) == (None, None, {})
        assert (state["best_model_path"], state["kth_best_model_path"], state["kth_value"]) == ("", "", worst)
    assert plain.best_model_path == path
    assert (stopping.wait_count, stopping.best_score) == (0, inf)
    assert (tmp_path / "best.ckpt").exists()

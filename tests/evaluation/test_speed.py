import torch
from transformers import PreTrainedModel

from lit_prune.evaluation import speed
from tests.conftest import small_model


def test_tokens_over_the_best_seconds(model: PreTrainedModel, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    seen: list[tuple[int, int]] = []
    clock = iter([0, 100, 0, 100, 0, 4, 0, 8, 0, 2, 0, 16, 0, 3, 0, 4])  # a warm-up, and three runs of two parts
    monkeypatch.setattr("lit_prune.evaluation.speed.time.perf_counter", lambda: next(clock))

    def see(_module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
        cache = kwargs.get("past_key_values")
        seen.append((args[0].shape[1], 0 if cache is None else cache.get_seq_length()))  # type: ignore[attr-defined]

    model.register_forward_pre_hook(see, with_kwargs=True)
    model.train()
    found = speed.tokens_per_second(model)
    assert found == speed.Speed(prefill=32 / 2, decode=32 / 4)
    assert seen == [(32, 0), *((1, 32 + token) for token in range(32))] * 4
    assert model.training


def test_a_model_without_a_limit() -> None:
    model = small_model("gpt_neox")
    found = speed.tokens_per_second(model)
    assert found.prefill > 0
    assert found.decode > 0

import pytest
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
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = speed.tokens_per_second(model)
    assert found == speed.Speed(prefill=32 / 2, decode=32 / 4, device="CPU, 1 thread")
    assert seen == [(32, 0), *((1, 32 + token) for token in range(32))] * 4
    assert model.training


def test_a_model_without_a_limit() -> None:
    model = small_model("gpt_neox")
    found = speed.tokens_per_second(model)
    assert found.prefill > 0
    assert found.decode > 0


@pytest.mark.parametrize(
    ("device", "threads", "name"),
    [("cpu", 1, "CPU, 1 thread"), ("cpu", 2, "CPU, 2 threads"), ("cuda:1", 2, "GPU of cuda:1"), ("mps", 2, "mps")],
)
def test_a_speed_names_its_device(device: str, threads: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    assert speed._name(torch.device(device)) == name


def test_models_run_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [small_model(num_hidden_layers=count) for count in (1, 2)]
    turns: list[int] = []
    monkeypatch.setattr(speed, "_run", lambda model, *_: (turns.append(len(model.model.layers)), (2.0, 4.0))[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = [speed.Speed(prefill=32 / 2, decode=32 / 4, device="CPU, 2 threads")] * 2
    assert speed.compare_speed(models) == expected
    assert turns == [1, 2] * 4


@pytest.mark.parametrize(("seconds", "runs"), [(0.5, 3), (0.25, 6), (0.01, 25)])
def test_short_runs_are_repeated_for_three_seconds_at_most_25_times(
    seconds: float, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(speed, "_run", lambda *_: (taken.append(1), (seconds, seconds))[1])
    speed.compare_speed([small_model()])
    assert len(taken) == 1 + runs


def test_a_copy_without_weights_gets_random_ones_of_the_same_shapes(model: PreTrainedModel) -> None:
    like = speed.without_weights(model)
    assert like is not None
    assert {parameter.device.type for parameter in like.parameters()} == {"meta"}
    filled = speed.with_random_weights(like, model)
    shapes = [
        [(name, tensor.shape, tensor.dtype) for name, tensor in one.named_parameters()] for one in (model, filled)
    ]
    assert shapes[0] == shapes[1]
    assert all(float(parameter.detach().std()) > 0.01 for parameter in filled.parameters())
    buffers = zip(model.buffers(), filled.buffers(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in buffers)
    assert filled(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_model_of_other_shapes_than_its_config_has_no_copy(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(3, 3))  # type: ignore[union-attr]
    assert speed.without_weights(model) is None

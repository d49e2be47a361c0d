"""Layerwise forwards: order, single loads, and a clean end whatever goes wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mode_gguf.forward.layerwise import LayerCallbacks, run_layerwise

N_LAYERS, N_SAMPLES = 3, 4


class Harness:
    """Three layers, four forwards, and a diary of what happened in which order."""

    def __init__(self) -> None:
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(N_LAYERS))
        self.diary: list[str] = []
        self.results: dict[int, torch.Tensor] = {}
        self.open = 0

    def forward(self, number: int) -> Callable[[], None]:
        def run() -> None:
            x = torch.full((1, 2), float(number))
            self.open += 1
            try:
                for index, layer in enumerate(self.layers):
                    self.diary.append(f"arrive {number}:{index}")
                    x = layer(x)
                self.results[number] = x
            finally:
                self.open -= 1

        return run

    def run(self, forwards: list[Callable[[], None]] | None = None, **callbacks: Any) -> None:
        say = self.diary.append
        run_layerwise(
            list(self.layers),
            forwards or [self.forward(number) for number in range(N_SAMPLES)],
            LayerCallbacks(
                **{
                    "load": lambda i: say(f"load {i}"),
                    "free": lambda i: say(f"free {i}"),
                    "leave": lambda n, i: say(f"leave {n}:{i}"),
                    **callbacks,
                }
            ),
            description="test",
        )


def test_each_layer_is_loaded_once_and_samples_take_turns() -> None:
    harness = Harness()
    harness.run()
    for index in range(N_LAYERS):
        loaded, freed = harness.diary.index(f"load {index}"), harness.diary.index(f"free {index}")
        left = [harness.diary.index(f"leave {number}:{index}") for number in range(N_SAMPLES)]
        assert loaded < left[0]
        assert left == sorted(left)
        assert left[-1] < freed
        assert harness.diary.count(f"load {index}") == 1


def test_results_are_those_of_plain_forwards() -> None:
    harness = Harness()
    harness.run()
    for number in range(N_SAMPLES):
        x = torch.full((1, 2), float(number))
        for layer in harness.layers:
            x = layer(x)
        assert torch.equal(harness.results[number], x)


def test_hooks_are_gone_afterwards() -> None:
    harness = Harness()
    harness.run()
    assert not any(layer._forward_pre_hooks for layer in harness.layers)


class _OddError(Exception):
    pass


def _fails() -> None:
    raise _OddError("before the first layer")


def test_an_error_in_one_forward_ends_all() -> None:
    harness = Harness()
    forwards = [harness.forward(0), harness.forward(1), _fails, harness.forward(3)]
    with pytest.raises(_OddError, match="before the first layer"):
        harness.run(forwards)
    assert not harness.results
    assert harness.open == 0


def test_an_error_deep_inside_ends_all() -> None:
    harness = Harness()

    def fail_late() -> None:
        x = harness.layers[1](harness.layers[0](torch.zeros(1, 2)))
        raise _OddError(f"after layer 1: {x.shape}")

    with pytest.raises(_OddError, match="after layer 1"):
        harness.run([harness.forward(0), fail_late, harness.forward(2)])
    assert harness.open == 0


@pytest.mark.parametrize("callback", ["load", "free", "enter", "leave"])
def test_an_interrupt_in_the_driver_ends_all(callback: str) -> None:
    def interrupt(*arguments: int) -> None:
        if arguments[-1] == 1:
            raise KeyboardInterrupt

    harness = Harness()
    callbacks: dict[str, Any] = {callback: interrupt}
    with pytest.raises(KeyboardInterrupt):
        harness.run(**callbacks)
    assert harness.open == 0


def test_every_forward_has_its_own_gradient_mode() -> None:
    harness, modes = Harness(), []

    def forward(*, records: bool) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(records):
                x = torch.zeros(1, 2)
                for layer in harness.layers:
                    x = layer(x)
                    modes.append((records, torch.is_grad_enabled(), x.requires_grad))

        return run

    def check_driver(*arguments: int) -> None:
        assert torch.is_grad_enabled()

    harness.run([forward(records=False), forward(records=True)], load=check_driver, leave=check_driver)
    assert torch.is_grad_enabled()
    assert len(modes) == 2 * N_LAYERS
    assert all(records == enabled == recorded for records, enabled, recorded in modes)
    with torch.no_grad():
        harness.run([forward(records=True)])
        assert not torch.is_grad_enabled()


def test_a_forward_that_skips_a_layer_is_refused() -> None:
    harness = Harness()

    def skips() -> None:
        harness.layers[0](torch.zeros(1, 2))
        harness.layers[2](torch.zeros(1, 2))

    with pytest.raises(RuntimeError, match="did not pass the decoder layers in order"):
        harness.run([skips])

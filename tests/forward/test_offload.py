"""Offloading of suspended forwards' tensors to a store, and their restoring."""

import weakref
from collections.abc import Hashable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.forward import offload, recorded_forward
from mode_gguf.forward.hidden_store import HiddenStore
from mode_gguf.forward.layerwise import LayerCallbacks, run_layerwise
from mode_gguf.forward.offload import TensorOffload

N_LAYERS, N_SAMPLES, WIDTH = 3, 4, 64


class TextModel(nn.Module):
    """A text model that adds image features after each layer, as DeepStack does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(N_LAYERS))

    def forward(self, *, embeddings: Tensor, features: list[Tensor]) -> Tensor:
        x = embeddings
        for index, layer in enumerate(self.layers):
            x = layer(x) + features[index % len(features)]
        return x


class Model(nn.Module):
    """A model that encodes an image, runs its text model, and uses the encoding once more."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(WIDTH, WIDTH)
        self.text = TextModel()

    def forward(self, x: Tensor) -> Tensor:
        image = self.visual(x)
        outer = self.text(embeddings=image * 2, features=[image + 1, image - 1])
        return outer + image  # type: ignore[no-any-return]


class RecordingStore(HiddenStore):
    """A store that records the tensors it was given."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.given: dict[Hashable, weakref.ref[Tensor]] = {}
        self.most_filed = 0

    def put(self, key: Hashable, tensor: Tensor) -> None:
        super().put(key, tensor)
        self.given[key] = weakref.ref(tensor)
        self.most_filed = max(self.most_filed, self.filed)


def recording_stores(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[RecordingStore]:
    """The stores that `module` makes from now on."""
    stores: list[RecordingStore] = []

    def recording_store(limit_bytes: int) -> RecordingStore:
        stores.append(RecordingStore(limit_bytes))
        return stores[-1]

    monkeypatch.setattr(module, "HiddenStore", recording_store)
    return stores


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_MIN_BYTES", 1)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return list(torch.randn(N_SAMPLES, 8, WIDTH, generator=torch.Generator().manual_seed(1)))


def forwards(model: Model, images: list[Tensor], results: dict[int, Tensor]) -> Iterator[object]:
    def forward(number: int) -> None:
        with torch.no_grad():
            results[number] = model(images[number])

    for number in range(len(images)):
        yield lambda number=number: forward(number)


@pytest.mark.parametrize(("limit", "in_files"), [(1, True), (5_000, True), (1 << 20, False)])
@pytest.mark.parametrize("keep", [False, True])
def test_nothing_changes(model: Model, images: list[Tensor], limit: int, in_files: bool, keep: bool) -> None:
    results: dict[int, Tensor] = {}
    storage_bytes: list[int] = []

    def measure_storages(layer: int) -> None:
        """Record the bytes of all given tensors while every sample is suspended."""
        there = [tensor for reference in store.given.values() if (tensor := reference()) is not None]
        storage_bytes.append(sum(tensor.untyped_storage().nbytes() for tensor in there))

    store = RecordingStore(limit)
    with store:
        run_layerwise(
            list(model.text.layers),
            list(forwards(model, images, results)),  # type: ignore[arg-type]
            LayerCallbacks(load=measure_storages, free=lambda layer: None),
            offload=TensorOffload(store, model, "text", keep=keep),
            description="test",
        )
        kept = {key: store.take(key).clone() for key in store.given if isinstance(key, tuple) and key in store}
    for number, image in enumerate(images):
        assert torch.equal(results[number], model(image))
    assert len(kept) == (N_LAYERS * N_SAMPLES if keep else 0)
    for number in range(N_SAMPLES if keep else 0):
        assert torch.equal(kept[number, 0], model.visual(images[number]) * 2)
    assert (store.most_filed > 0) == in_files
    if limit == 1:
        assert storage_bytes == [0] * N_LAYERS
        assert {(0, "inside", 1), (0, "inside", 2), (0, "outside", 0)} <= store.given.keys()


def test_calibration_in_a_byte_of_memory(pico: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(pico)
    plain = calibrate(checkpoint, samples, device="cpu")
    stores = recording_stores(monkeypatch, recorded_forward)
    offloaded = calibrate(checkpoint, samples, device="cpu", hidden_bytes=1)
    for name, array in plain.arrays.items():
        np.testing.assert_array_equal(offloaded.arrays[name], array, err_msg=name)
    (store,) = stores
    assert store.held_bytes == store.filed == 0
    deep_stack = [key for key in store.given if isinstance(key, tuple) and key[1] == "inside"]
    assert store.most_filed > len(samples)
    assert len(deep_stack) > 2

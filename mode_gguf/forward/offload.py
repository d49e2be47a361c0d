"""Where the tensors of sleeping forwards lie: as they are, or out of the way in a `HiddenStore`.

A forward that waits for its next layer holds that layer's input, what the text model was called with (embeddings,
DeepStack features), and what the modules beside the text model computed for it (image embeddings). With many samples
that takes more room than a layer's weights. Their storages are emptied while the forward sleeps and filled again before
anybody looks: the frames of a Python call hold its tensors, so that they cannot be freed in any other way.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mode_gguf.forward.hidden_store import HiddenStore

_SMALL = 1 << 12
"""Tensors of fewer bytes stay where they are."""

_SHARE_OF_DEVICE = 0.25
"""Of a GPU's memory that is free when the first tensor comes, for tensors that may sleep there."""


@dataclass(frozen=True, slots=True)
class _Offloaded:
    """A tensor of a sleeping forward; `emptied` unless it sleeps on its GPU or the store's own is the same memory."""

    key: Hashable
    tensor: Tensor
    emptied: bool
    on_device: int = 0


@dataclass(slots=True)
class _SampleTensors:
    """What one forward holds besides its layer's input: called with outside the text model, and inside it."""

    outside: list[Tensor] = field(default_factory=list)
    inside: list[Tensor] = field(default_factory=list)
    parked_outside: list[_Offloaded] = field(default_factory=list)


_SAMPLE: ContextVar[_SampleTensors] = ContextVar("lane")
"""Every greenlet has variables of its own."""


class TensorOffload:
    """Takes the tensors of one sleeping forward after the other.

    On the CPU, what the store holds in memory is the forward's own tensor, so nothing moves before the store's limit is
    reached. On a GPU a quarter of what is free there is used before the store is.

    Args:
        store: for tensors that give way.
        model: whose forwards they are.
        text_model: name of the submodule with the decoder layers.
        keep: whether the store keeps the inputs of all layers, under (sample, layer), when forwards go on.
    """

    def __init__(self, store: HiddenStore, model: nn.Module, text_model: str, *, keep: bool = False) -> None:
        self._store = store
        self._model, self._text_model = model, text_model
        self._keep = keep
        self._device_room: int | None = None

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Notice what forwards hold that begin while the context lasts."""
        parent, _, name = self._text_model.rpartition(".")
        beside = [module for child, module in self._model.get_submodule(parent).named_children() if child != name]
        text_model = self._model.get_submodule(self._text_model)

        def begin(module: nn.Module, arguments: object) -> None:
            _SAMPLE.set(_SampleTensors())

        def computed(module: nn.Module, arguments: object, output: object) -> None:
            self._lane.outside.extend(_tensors(output))

        def enter(module: nn.Module, arguments: object, options: Mapping[str, object]) -> None:
            self._lane.inside.extend(_tensors(options))

        with ExitStack() as hooks:
            hooks.callback(self._model.register_forward_pre_hook(begin).remove)
            hooks.callback(text_model.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for module in beside:
                hooks.callback(module.register_forward_hook(computed).remove)
            yield

    @contextmanager
    def parked(self, number: int, layer: int, hidden: Tensor, *, last: bool) -> Iterator[None]:
        """For as long as forward `number` sleeps before `layer`; called by it.

        Args:
            hidden: the layer's input; nobody may write to it.
            last: whether this is the last layer, after which the forward may look at whatever it holds.
        """
        lane = self._lane
        if layer == 0:
            outside = _distinct(lane.outside, but=[hidden, *lane.inside])
            lane.parked_outside = [self._park((number, "outside", index), tensor) for index, tensor in outside]
        inside = _distinct(lane.inside, but=[hidden])
        parked = [self._park((number, "inside", index), tensor) for index, tensor in inside]
        of_layer = self._park((number, layer), hidden, must_keep=self._keep)
        yield  # a forward that is cancelled needs none of them again
        self._wake(of_layer, forget=not self._keep)
        for one in parked:
            self._wake(one, forget=last)
        if last:
            for one in lane.parked_outside:
                self._wake(one, forget=True)

    @property
    def _lane(self) -> _SampleTensors:
        """Of the forward that is running."""
        return _SAMPLE.get(None) or _SampleTensors()

    def _park(self, key: Hashable, tensor: Tensor, *, must_keep: bool = False) -> _Offloaded:
        if tensor.is_cuda and not must_keep and key not in self._store and self._takes_room(tensor):
            return _Offloaded(key, tensor, emptied=False, on_device=tensor.nbytes)
        if key not in self._store:
            self._store.put(key, tensor)
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
        emptied = whole and self._store.get(key).data_ptr() != tensor.data_ptr()
        if emptied:
            storage.resize_(0)
        return _Offloaded(key, tensor, emptied)

    def _wake(self, parked: _Offloaded, *, forget: bool) -> None:
        if parked.on_device and self._device_room is not None:
            self._device_room += parked.on_device
        if parked.emptied:
            parked.tensor.untyped_storage().resize_(parked.tensor.nbytes)
            parked.tensor.copy_(self._store.get(parked.key))
        if forget:
            self._store.drop(parked.key)

    def _takes_room(self, tensor: Tensor) -> bool:
        """Take room for a tensor on its GPU, if there is any."""
        if self._device_room is None:
            self._device_room = int(_SHARE_OF_DEVICE * torch.cuda.mem_get_info(tensor.device)[0])
        if tensor.nbytes > self._device_room:
            return False
        self._device_room -= tensor.nbytes
        return True


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested arguments or outputs that are worth moving."""
    if isinstance(value, Tensor):
        if value.nbytes >= _SMALL:
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)


def _distinct(tensors: Iterable[Tensor], *, but: Iterable[Tensor]) -> list[tuple[int, Tensor]]:
    """Those of `tensors` with a memory of their own, with their places in the list; none that shares it with `but`."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in but}
    found = []
    for index, tensor in enumerate(tensors):
        place = tensor.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            found.append((index, tensor))
    return found

"""The most bytes that tensors hold at once, counted op by op: the same on every machine, where the memory of a process is not."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Counts while it is entered what ops make; tensors from before, and what an op needs for itself alone, are not counted."""

    def __init__(self) -> None:
        """Nothing is held yet."""
        super().__init__()
        self.now = 0
        self.most = 0
        self.parts: list[int] = []
        """The most of each part that `part` has ended."""
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs an op; where its results are no views of what it was given, their bytes count until nothing refers to them."""
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in given and key not in self._storages:
                self._add(key, x)
        return found

    def part(self, *_: object) -> None:
        """Ends a part: as a recipe's `progress`, one behind each layer. Parts grow with the images, or not, each by its own line."""
        self.parts.append(self.most)
        self.most = self.now

    def _add(self, key: int, x: Tensor) -> None:
        storage = x.untyped_storage()
        size = storage.nbytes()

        def forget(_: weakref.ref) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.now += size
        self.most = max(self.most, self.now)

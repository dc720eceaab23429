"""The attributes by which reversible columns show and change their memory policy."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace

from revnets.engine.graph import Graph
from revnets.engine.memory_mode import (
    Budget,
    Kept,
    Memory,
    MemoryPolicy,
    Products,
    kept_cells,
    memory_modes,
    offloaded_cells,
    products_of_cells,
    stored_cells,
)


class PolicyAttributes:
    """The attributes by which columns show and change their memory policy."""

    graph: Graph
    _policy: MemoryPolicy

    @property
    def policy(self) -> MemoryPolicy:
        """What is kept for backward.

        Raises:
            ArgumentError: (when set) another number of modes than columns, or a stored cell that does not exist.
        """
        return self._policy

    @policy.setter
    def policy(self, value: MemoryPolicy) -> None:
        memory_modes(value.modes, self.graph.columns)
        stored_cells(value.stored, len(self.graph.nodes))
        kept_cells(dict(value.kept), len(self.graph.nodes))
        offloaded_cells(value.offloaded, len(self.graph.nodes))
        products_of_cells(dict(value.products), len(self.graph.nodes))
        self._policy = value

    @contextmanager
    def using(
        self,
        policy: MemoryPolicy | None = None,
        *,
        modes: str | Sequence[str] | None = None,
        stored: int | Iterable[int] | None = None,
        kept: Kept | Iterable[int] | None = None,
        verify: bool | None = None,
        offloaded: Iterable[int] | None = None,
        products: Products | None = None,
    ) -> Generator[MemoryPolicy]:
        """Run a `with` block under another policy; the present one returns at its end, also after an exception.

        Args:
            policy: the other policy; by default the present one with the changes below.
            modes: as for the attribute `memory`. A pending budget is not planned inside of the block.
            stored: as for the attribute `stored`.
            kept: as for the attribute `kept`.
            verify: as for the attribute `verify`.
            offloaded: as for the attribute `offloaded`.
            products: as for the attribute `products`.

        Raises:
            ArgumentError: as the attributes do.
        """
        found = self._policy
        try:
            if policy is not None:
                self.policy = policy
            if modes is not None:
                self.memory = modes
            if stored is not None:
                self.stored = stored
            if kept is not None:
                self.kept = kept
            if verify is not None:
                self.verify = verify
            if offloaded is not None:
                self.offloaded = offloaded
            if products is not None:
                self.products = products
            yield self._policy
        finally:
            self._policy = found

    @property
    def memory(self) -> tuple[Memory, ...]:
        """The memory mode of each column.

        Setting one for all or one per column ends a pending budget, `kept`, `offloaded` and `products`.
        """
        return self._policy.modes

    @memory.setter
    def memory(self, value: str | Sequence[str]) -> None:
        modes = memory_modes(value, self.graph.columns)
        self._policy = MemoryPolicy(modes, self._policy.stored, self._policy.verify)

    @property
    def stored(self) -> frozenset[int]:
        """Cells (by their index t) that keep all they save, whatever their column's mode says: no replay.

        Set it to their indices, or to a number of cells counted from the end. `revnets.plan` finds those that save the
        most work under a budget.
        """
        return self._policy.stored

    @stored.setter
    def stored(self, value: int | Iterable[int]) -> None:
        self._policy = replace(self._policy, stored=stored_cells(value, len(self.graph.nodes)))

    @property
    def kept(self) -> dict[int, int | None]:
        """Cells (by their index t) that keep the state that they replace in place of its lost bits.

        The value says how much a replay brings back: None is all that the cell saves, an integer k its first k tensors;
        the others stay. Set it to such a mapping, or to indices of cells that keep the state alone.
        """
        return dict(self._policy.kept)

    @kept.setter
    def kept(self, value: Kept | Iterable[int]) -> None:
        kept = tuple(kept_cells(value, len(self.graph.nodes)).items())
        self._policy = replace(self._policy, kept=kept)

    @property
    def offloaded(self) -> frozenset[int]:
        """Cells (by their index t) that keep in host memory what they keep for backward. Set it to their indices.

        Of stored cells these are the tensors that autograd saves, of others the lost bits or the state.
        """
        return self._policy.offloaded

    @offloaded.setter
    def offloaded(self, value: Iterable[int]) -> None:
        self._policy = replace(self._policy, offloaded=offloaded_cells(value, len(self.graph.nodes)))

    @property
    def products(self) -> dict[int, tuple[int, ...]]:
        """Matrix products whose results cells (by their index t) keep, so that a replay does not compute them again.

        Convolutions, matrix products and attention without dropout count, from 0 in the order of the cell's call. Set
        it to a mapping of cells to such numbers; a number beyond the last product keeps nothing. Compiled and stored
        cells do without. Gradients are the same bits with any of them.
        """
        return dict(self._policy.products)

    @products.setter
    def products(self, value: Products) -> None:
        products = tuple(products_of_cells(value, len(self.graph.nodes)).items())
        self._policy = replace(self._policy, products=products)

    @property
    def verify(self) -> bool:
        """Compare what backward rebuilds with checksums of the forward."""
        return self._policy.verify

    @verify.setter
    def verify(self, value: bool) -> None:
        self._policy = replace(self._policy, verify=value)

    @property
    def budget(self) -> Budget | None:
        """A memory budget that is pending until the first training forward of the model, see `revnets.keep_budget`."""
        return self._policy.budget

    @budget.setter
    def budget(self, value: Budget | None) -> None:
        self._policy = replace(self._policy, budget=value)

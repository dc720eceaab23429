"""Bytes, peaks and compute of the cells of a simulated step add up to those of the step."""

from __future__ import annotations

import pytest

import revnets
from revnets.memory.cell_options import CellPolicy, PolicySpace
from revnets.memory.policy_search import ALL, LOST, STATE, search
from revnets.memory.saved_tensors import costs_of_cells
from revnets.memory.simulation import Footprint, simulate
from revnets.memory.step_record import CellUses
from tests.support.staged_networks import DEPTHS, DIMS, IMAGES, RewiredNet, StagedNet, images, staged_net

KINDS = pytest.mark.parametrize("kind", [StagedNet, RewiredNet])

STATE_BYTES = 4 * IMAGES[0] * DIMS[0] * IMAGES[2] * IMAGES[3]
"""Bytes of one state of the first stage."""


def footprint(net, policy: CellPolicy) -> Footprint:
    policy.apply(revnets.find_columns(net))
    return simulate(net, (images(),))


def all_uses(net) -> dict[str, CellUses]:
    return {mode: footprint(net, CellPolicy(mode)).cells for mode in ("store", "recompute", "exact")}


@KINDS
@pytest.mark.parametrize("mode", ["store", "exact"])
def test_cells_add_up_to_the_step(kind, mode):
    found = footprint(staged_net(kind), CellPolicy(mode))
    late, early = DEPTHS[::-1]
    assert found.cells.indices == (*range(late, late + early), *range(late))  # in the order of the forward
    assert max(found.cells.peaks) == found.peak
    assert 0.9 * found.work < sum(found.cells.work) <= found.work


def test_each_mode_keeps_the_expected_bytes():
    found = {mode: footprint(staged_net(), CellPolicy(mode)) for mode in ("store", "recompute", "exact")}
    uses = {mode: one.cells for mode, one in found.items()}
    assert sum(uses["store"].kept) > sum(uses["recompute"].kept) > sum(uses["exact"].kept)
    grown = found["store"].kept - found["exact"].kept
    assert sum(uses["store"].kept) - sum(uses["exact"].kept) == pytest.approx(grown, rel=0.05)
    assert sum(uses["store"].work) < sum(uses["recompute"].work) < sum(uses["exact"].work)


@KINDS
def test_choice_has_bytes_and_compute_of_its_options(kind):
    """The peak agrees up to one or two states, which neighboring cells share."""
    net = staged_net(kind)
    uses, costs, columns = all_uses(net), costs_of_cells(net, (images(),)), revnets.find_columns(net)
    base = footprint(net, CellPolicy("recompute"))
    for share in (1.2, 1.6, 2.4):
        peak = int(share * base.peak)
        space = PolicySpace(uses, costs, columns, peak)
        found = search(space.options, space.room)
        assert found is not None
        assert max(space.peaks(found)) <= peak
        step = footprint(net, space.policy(found))
        assert 0.85 * peak < step.peak < peak + 2 * STATE_BYTES
        assert sum(step.cells.work) == pytest.approx(sum(option.work for option in found), rel=0.02)


def test_column_is_recomputed_if_its_cells_keep_their_states():
    net = staged_net()
    uses, costs, columns = all_uses(net), costs_of_cells(net, (images(),)), revnets.find_columns(net)
    space = PolicySpace(uses, costs, columns, 10**9)

    def policy(wanted: int | None) -> CellPolicy:
        return space.policy(
            [next((one for one in found if one.replayed == wanted), found[0]) for found in space.options]
        )

    assert policy(LOST) == CellPolicy("exact")
    assert policy(ALL).stored == tuple(range(columns.cell_count))
    recomputed = set(range(columns.column_count)) - set(columns.first_columns)
    assert (policy(STATE).recomputed, policy(STATE).kept_cells) == (tuple(sorted(recomputed)), ())


def test_compiled_cell_is_not_kept_in_part():
    """A compiled cell saves other tensors than the simulation, which runs it in eager mode."""
    net = staged_net()
    uses, costs, columns = all_uses(net), costs_of_cells(net, (images(),)), revnets.find_columns(net)
    other, index = [place for place, cell in enumerate(columns.flat()) if cell.gain is not None][-2:]
    compiled = columns.flat()[index]
    next(module for module in compiled.modules() if not list(module.children())).compile(backend="eager")
    options = dict(zip(costs, PolicySpace(uses, costs, columns, 10**9).options, strict=True))
    assert [(option.replayed, option.products) for option in options[index]] == [(LOST, ()), (STATE, ()), (ALL, ())]
    assert len(options[other]) > 3

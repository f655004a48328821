"""What ranks do for each other, without processes: parts, shares, sums."""

from types import SimpleNamespace

import pytest
import torch

from base import ranks
from base.errors import LostProcess, UserError


def test_one_process_is_the_first_and_has_everything():
    assert (ranks.count(), ranks.rank(), ranks.is_first()) == (1, 0, True)
    assert ranks.local() == (0, 1)
    assert ranks.part(7) == range(7)
    assert ranks.share([3, 1, 2]) == [3, 1, 2]
    assert ranks.gather([3, 1, 2]) == [3, 1, 2]
    assert ranks.total([1.5, 2]) == [1.5, 2]
    assert ranks.from_first(lambda: 5) == 5
    assert not ranks.is_lost(RuntimeError("Connection closed by peer"))

    def fail():
        raise UserError("one line")

    with pytest.raises(UserError):
        ranks.from_first(fail)
    with ranks.joined():
        assert ranks.count() == 1


@pytest.mark.parametrize(("total", "count"), [(4, 2), (5, 2), (5, 3), (64, 8), (7, 7), (3, 5), (0, 2)])
def test_parts_and_shares_are_everything_once(total, count, monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: count)
    parts, shares = [], []
    for rank in range(count):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts.append(ranks.part(total))
        shares.append(ranks.share(list(range(total))))
    assert [i for part in parts for i in part] == list(range(total))
    assert sorted(i for share in shares for i in share) == list(range(total))
    for sizes in (list(map(len, parts)), list(map(len, shares))):
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("total", "count"), [(4, 2), (5, 2), (2, 3), (0, 2)])
def test_gathered_shares_are_in_order_again(total, count, monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: count)
    monkeypatch.setattr(ranks.dist, "all_gather_object", lambda lists, mine: lists.__setitem__(slice(None), everything))
    items = [f"image {i}" for i in range(total)]
    everything = [items[rank::count] for rank in range(count)]
    assert ranks.gather(everything[0]) == items


def test_ranks_meet_on_the_cpu_beside_a_card(cards, monkeypatch):
    """A barrier may use NCCL, which needs a card per rank, even with `--device cpu`."""
    cards((8, 0))
    groups, places = [], []
    replaced = SimpleNamespace(
        is_available=lambda: True,
        is_torchelastic_launched=lambda: True,
        is_initialized=lambda: bool(groups),
        init_process_group=groups.append,
        destroy_process_group=groups.clear,
        get_world_size=lambda: 2,
        get_rank=lambda: 0,
        all_reduce=lambda tensor: places.append(tensor.device),
    )
    monkeypatch.setattr(ranks, "dist", replaced)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with ranks.joined():
        assert groups == ["cpu:gloo,cuda:nccl"]
    assert places == [torch.device("cpu")]
    assert not groups


def test_a_broken_link_is_a_lost_process(monkeypatch):
    monkeypatch.setattr(ranks.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda _: monkeypatch.setattr(ranks, "count", lambda: 2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LostProcess), ranks.joined():
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError), ranks.joined():
        raise RuntimeError("shape mismatch")

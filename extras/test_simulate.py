"""Tests of the forecast of a round's minutes, on made-up cards and a few short games."""

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oel
from extras import simulate

FEW = {"lists": 2, "episodes": 3, "steps": 2, "batch_episodes": 5, "eval_games": 5, "probe_games": 3}
CFG = dataclasses.replace(oel.Config(), **FEW, reply_limit=120, experience_budget=100)


def card(tokens: int) -> simulate.Card:
    """A card with room for so many tokens beside the weights, and for less beside what training needs."""
    return simulate.Card(2 * simulate.PARAMETERS + tokens * simulate.TOKEN_BYTES, 2e12, 4e14, offload=True)


@pytest.mark.parametrize("phase", simulate.PHASES)
def test_every_reply_ends_at_its_scripted_length(phase):
    sampler = simulate.simulate(CFG, card(40_000), phase, mean=60, share=1, seed=3)
    mean, limit = (50, 100) if phase == "extraction" else (60, 120)
    lengths = simulate.scripted_lengths(mean, limit)
    assert abs(lengths.mean() - mean) < 1 and lengths.max() == limit
    asked = [(i, turn, reply) for i, replies in enumerate(sampler.results) for turn, reply in enumerate(replies)]
    assert len(asked) >= 6
    for i, turn, reply in asked:
        assert len(reply.response_ids) == lengths[oel.derive_seed(3, i, turn) % len(lengths)]


def test_rows_that_are_read_as_far_as_they_are_filled_take_less_time():
    slow = card(400_000)._replace(bandwidth=1e10)
    how = {"mean": 60, "share": 1, "steps": 1}
    found = [simulate.forecast(CFG, slow, **how, padded=x)["minutes of a round"] for x in (True, False)]
    assert all(padded > by_row for padded, by_row in zip(*found, strict=True))


def test_more_memory_and_graphs_never_take_longer_and_the_parts_add_up():
    tables = [simulate.forecast(CFG, card(n), mean=60, share=1, steps=1) for n in (1_000, 8_000, 400_000)]
    minutes = [table.pop("minutes of a round") for table in tables]
    for less, more in itertools.pairwise(minutes):
        assert all(x > y for x, y in zip(less, more, strict=True))
    for table, total in zip(tables, minutes, strict=True):
        assert [*table] == [*simulate.PHASES[:5], "gradients", *simulate.PHASES[5:], "optimizer"]
        assert all(eager >= graphs > 0 for eager, graphs in table.values())
        assert [sum(x) / 60 for x in zip(*table.values(), strict=True)] == pytest.approx(total)

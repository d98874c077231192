"""Nodes that fail where others succeed get no more work."""

from vcf_batch.driver.quarantine import FAILURES, Quarantine
from vcf_batch.records import Shard

A, B = "node a", "node b"


def shard(index: int) -> Shard:
    return Shard(index, index, index + 1, f"{index:05d}")


def test_a_node_that_fails_in_a_row_while_others_succeed_is_left_out() -> None:
    quarantine = Quarantine()
    for work in range(FAILURES - 1):
        assert not quarantine.failed(A, shard(work), "broken")
        assert not quarantine.succeeded(B, "shard")
    assert quarantine.failed(A, shard(FAILURES), "broken") == {A}
    assert (quarantine.nodes, quarantine.failing) == ({A}, {A})
    assert quarantine.reasons[A] == "broken"
    assert not quarantine.succeeded(B, "shard")


def test_the_other_success_may_come_last() -> None:
    quarantine = Quarantine()
    for work in range(FAILURES):
        assert not quarantine.failed(A, shard(work), "broken")
    assert quarantine.succeeded(B, "shard") == {A}


def test_where_everything_fails_no_node_is_left_out() -> None:
    """What fails everywhere is not a node's fault."""
    quarantine = Quarantine()
    for work in range(9):
        assert not quarantine.failed(A, shard(work), "broken")
        assert not quarantine.failed(B, shard(work), "broken")


def test_one_shard_cannot_bring_a_node_down() -> None:
    """A row that kills its workers is no reason to lose nodes."""
    quarantine = Quarantine()
    for _ in range(9):
        assert not quarantine.failed(A, shard(0), "broken")
        assert not quarantine.succeeded(B, "shard")


def test_a_success_clears_a_node() -> None:
    quarantine = Quarantine()
    for work in range(20):
        assert not quarantine.succeeded(B, "shard")
        assert not quarantine.failed(A, shard(work), "broken")
        assert not quarantine.succeeded(A, "shard")


def test_a_lifted_quarantine_begins_again() -> None:
    quarantine = Quarantine()
    quarantine.failed(A, shard(0), "broken")
    quarantine.succeeded(B, "shard")
    quarantine.failed(A, shard(1), "broken")
    assert quarantine.failed(A, shard(2), "broken") == {A}
    quarantine.lift()
    assert not quarantine.nodes
    assert not quarantine.failed(A, shard(3), "broken")


def test_a_node_that_loads_and_then_crashes_is_left_out() -> None:
    """A worker that crashes is replaced by one that loads: that does not make up for the shards."""
    quarantine = Quarantine()
    for index in range(FAILURES - 1):
        assert not quarantine.failed(A, shard(index), "broken")
        assert not quarantine.succeeded(A, "load")
        assert not quarantine.succeeded(B, "shard")
    assert quarantine.failed(A, shard(FAILURES), "broken") == {A}


def test_a_load_makes_up_for_loads_and_outdoes_no_more_than_loads() -> None:
    """Where every node loads and none finishes a shard, no node is left out."""
    quarantine = Quarantine()
    for index in range(9):
        for node in (A, B):
            assert not quarantine.succeeded(node, "load")
            assert not quarantine.failed(node, shard(index), "broken")
    quarantine = Quarantine()
    for _ in range(FAILURES - 1):
        assert not quarantine.failed(A, None, "no model")
    assert not quarantine.succeeded(A, "load")
    assert not quarantine.succeeded(B, "load")
    assert not quarantine.failing
    for _ in range(FAILURES):
        assert not quarantine.failed(A, None, "no model")
    assert quarantine.succeeded(B, "load") == {A}

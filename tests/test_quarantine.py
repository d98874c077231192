"""Nodes that fail where others succeed get no more work."""

from vcf_batch.quarantine import FAILURES, Quarantine

A, B = "node a", "node b"


def test_a_node_that_fails_in_a_row_while_others_succeed_is_left_out() -> None:
    quarantine = Quarantine()
    for work in range(FAILURES - 1):
        assert not quarantine.failed(A, work, "broken")
        assert not quarantine.succeeded(B)
    assert quarantine.failed(A, FAILURES, "broken") == {A}
    assert (quarantine.nodes, quarantine.failing) == ({A}, {A})
    assert quarantine.reasons[A] == "broken"
    assert not quarantine.succeeded(B)


def test_the_other_success_may_come_last() -> None:
    quarantine = Quarantine()
    for work in range(FAILURES):
        assert not quarantine.failed(A, work, "broken")
    assert quarantine.succeeded(B) == {A}


def test_where_everything_fails_no_node_is_left_out() -> None:
    """What fails everywhere is not a node's fault."""
    quarantine = Quarantine()
    for work in range(9):
        assert not quarantine.failed(A, work, "broken")
        assert not quarantine.failed(B, work, "broken")


def test_one_shard_cannot_bring_a_node_down() -> None:
    """A row that kills its workers is no reason to lose nodes."""
    quarantine = Quarantine()
    for _ in range(9):
        assert not quarantine.failed(A, "the same shard", "broken")
        assert not quarantine.succeeded(B)


def test_a_success_clears_a_node() -> None:
    quarantine = Quarantine()
    for work in range(20):
        assert not quarantine.succeeded(B)
        assert not quarantine.failed(A, work, "broken")
        assert not quarantine.succeeded(A)


def test_a_lifted_quarantine_begins_again() -> None:
    quarantine = Quarantine()
    quarantine.failed(A, 0, "broken")
    quarantine.succeeded(B)
    quarantine.failed(A, 1, "broken")
    assert quarantine.failed(A, 2, "broken") == {A}
    quarantine.lift()
    assert not quarantine.nodes
    assert not quarantine.failed(A, 3, "broken")

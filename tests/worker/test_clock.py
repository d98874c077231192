"""How far a shard is, as a worker's heartbeat tells it."""

from vcf_batch.worker.clock import Clock


def test_each_phase_and_each_sample_is_progress() -> None:
    """A worker that works does not look as if it hung."""
    clock = Clock()
    with clock("sample"):
        assert clock.progress == 0
    assert clock.progress == 1
    clock.note_sample()
    assert (clock.progress, clock.samples_done) == (2, 1)
    clock.note_progress()
    assert (clock.progress, clock.samples_done) == (3, 1)
    assert clock.seconds.keys() == {"sample"}

"""The settings of a run: their choices and limits, checked once, and the fingerprint that names a run's content."""

"""The preparation of a run before a worker starts: defaults, models, the manifest, the claim on the output."""

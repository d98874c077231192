"""What the driver settles before a worker starts: defaults, models, the manifest, the claim on the output."""

"""Models by name: resolved to one exact version by the driver, fetched once by each node."""

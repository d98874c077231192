"""The LoRAs of a worker: read ahead of the sampling, held for later batches, switched between batches."""

"""LoRAs: low-rank updates of a model's weights, read from a file and merged into them."""

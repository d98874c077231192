"""``score``: numbers for the images of an output, added after its run; and thresholds that are measured on it."""

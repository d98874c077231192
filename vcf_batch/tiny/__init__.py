"""The embedded model family ``tiny``: a procedural captioned world and the small models trained on it."""

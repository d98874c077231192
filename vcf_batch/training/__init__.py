"""Training of an aligner on captioned images, on Ray Train."""

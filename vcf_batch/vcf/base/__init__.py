"""The families of base models: what differs between Stable Diffusion 1 and 2 and Stable Diffusion XL."""

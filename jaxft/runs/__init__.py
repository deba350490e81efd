"""A run's folder: what stands in it, who writes it, and what a later process finds there."""

"""Image data sets in memory: read, batched, augmented, sampled. Nothing here knows of models."""

OWN = "own"  # the name of a data set that a user has in Python; here, where nothing needs NumPy

"""Image data sets in memory: read, batched, augmented, sampled. Nothing here knows of models."""

"""Kernels of the losses: tensors in, tensors out. Installs as `immunity_fast.kernels`, imports nothing else of it."""

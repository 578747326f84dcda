"""The expert networks: one file a kind of architecture of ours, and those of libraries and users by their names."""

from immunity_fast.experts.registry import NAMES, WITH_STEMS, create, resolve, split_names, title

__all__ = ["NAMES", "WITH_STEMS", "create", "resolve", "split_names", "title"]

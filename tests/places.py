"""Where the repository lies, for tests that start its commands or read its files."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

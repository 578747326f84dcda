"""The package's commands as a person types them into a shell."""

import shlex
from collections.abc import Iterable


def shell_command(module: str, words: Iterable[str]) -> str:
    """The line for a shell that runs a module of immunity_fast with these arguments, quoted where they have to be."""
    return f"python -m immunity_fast.{module} {shlex.join(words)}"

"""How `auto` comes to use a variant of an operation: by a trial on the very machine (docs/trials.md)."""

from .modes import mode

__all__ = ["mode"]

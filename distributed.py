"""Names of `loop`, until every command imports them from there."""

from loop import World
from loop import join_world as world

__all__ = ["World", "world"]

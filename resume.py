"""Names of `loop`, until every command imports them from there."""

from loop import STATE_NAME, check_settings, is_empty, load_state, locked, save_state, stop_signals, to_json_values
from utils import Stopped

plain = to_json_values
__all__ = [
    "STATE_NAME", "Stopped", "check_settings", "is_empty", "load_state", "locked", "plain", "save_state",
    "stop_signals",
]  # fmt: skip

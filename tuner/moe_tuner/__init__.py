"""The daemon that retunes hot knobs while traffic changes."""

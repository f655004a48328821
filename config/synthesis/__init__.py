"""Synthetic rain: its styles, how streaks are rendered, and figures to compare it with real rain."""

"""The mixture: N experts at once, the gate that weighs them, and which networks of a user's own can be such."""

"""An evaluation for sceptics: what is attacked, by whom, what was found, and what is left of it for people."""

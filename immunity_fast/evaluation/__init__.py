"""An evaluation for sceptics: what is attacked, by whom, what was found, and how it is written down."""

"""Poisons of training images, made by Witches' Brew for a target, and how often they work on what is trained on them.

`settings` has what is asked for, `crafting` makes poisons with a run as the surrogate, `setups` trains victims on them,
and `tables` says what came of it.
"""

"""Checks that the ranks and their machines are fit to train.

`check.py` runs before step 0, `selftest.py` after the first weight sync, `stragglers.py` watches every step, and
`doctor.py` needs no package at all. May import model, objectives, parallel, tracking and types. Start reading at
`check.py`.
"""

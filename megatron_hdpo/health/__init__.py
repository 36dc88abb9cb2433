"""Whether the ranks and their machines are fit to train: checked before step 0, watched in every step."""

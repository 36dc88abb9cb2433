"""Problems and prompts: tasks, loading and checking, order of training, templates, leakage filter, warm-up data.

May import `types` and `rewards`; no torch. Start reading at `load.py`; a new task goes to `tasks/` (docs/adding-a-
task.md).
"""

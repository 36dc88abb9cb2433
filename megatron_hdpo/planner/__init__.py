"""Plan of a run before it starts: memory by kind, seconds per phase, communication, and a search over layouts.

Pure functions of an architecture, a cluster, a layout and a workload; what is not planned raises PlanError.
May import every room up to config; the command line and training (for its layout) import it.
Start with plan.py (one layout, and the search), then from_recipe.py and asked_work.py (the workload of a recipe).
"""

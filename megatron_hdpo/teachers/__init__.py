"""Teachers: which weights score for a distillation objective, and where they are kept while they do not score.

May import `model` and `weights`. Start with `teacher.py` (the interface); `build.py` chooses the class for a recipe.
"""

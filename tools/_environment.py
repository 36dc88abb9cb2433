"""First import of every script in this folder: outside the environment the script ends with one line, no traceback."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the package, where it is not installed

from megatron_hdpo.environment import explain_missing_packages

explain_missing_packages()

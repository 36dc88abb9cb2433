"""Import this first in a script of this folder: without the environment it then ends with one line, not a traceback."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the package, where it is not installed

from megatron_hdpo.environment import explain_missing_packages

explain_missing_packages()

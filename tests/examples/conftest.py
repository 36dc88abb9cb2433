"""Where the modules of the quickstart are: scripts that lie beside each other, and no package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

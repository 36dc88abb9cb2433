"""First import of every part of compare.py: a part run alone, or without packages, ends with one line."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the package, where it is not installed

from megatron_hdpo.environment import explain_missing_packages

started = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
if started.parent == Path(__file__).resolve().parent and started.name != "compare.py":
    sys.exit(f"{started.name} is a part of compare.py: run `python examples/compare/compare.py --help`")
explain_missing_packages()

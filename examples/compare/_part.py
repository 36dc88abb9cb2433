"""Import this first in a part of compare.py: alone, the part then says so; without packages, one line names them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the package, where it is not installed

from megatron_hdpo.environment import explain_missing_packages

started = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
if started.parent == Path(__file__).resolve().parent and started.name != "compare.py":
    sys.exit(f"{started.name} is a part of compare.py: run `python examples/compare/compare.py --help`")
explain_missing_packages()

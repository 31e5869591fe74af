"""What `test_accelerator` starts: checks in a process of their own, which has the pretend device.

python -m tests.accelerator.run STORE RESULTS
"""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.accelerator import models, prediction, pretend, terms, training, watching

CHECKS: dict[str, tuple[Any, ...]] = {
    name: check
    for module in (watching, models, terms, training, prediction)
    for name, check in module.CHECKS.items()
}


def main(store: Path, results: Path) -> None:
    """Every check, and into a file the trace of each that fails."""
    pretend.register()
    failed = {}
    for name, (check, *arguments) in CHECKS.items():
        further = [store] if "store" in inspect.signature(check).parameters else []
        try:
            check(*arguments, *further)
        except Exception:
            failed[name] = traceback.format_exc()
    results.write_text(json.dumps(failed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

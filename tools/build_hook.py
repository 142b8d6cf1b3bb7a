"""Hatch's build hook: compiles the code objects into the package before it is packed.

HIPQUANT_TARGETS=all builds for every machine, otherwise this one's are built. Objects that are up to date are kept.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CodeObjectsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs `hipquant.toolchain.compile.build_cpu` from the source tree."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        from hipquant.toolchain.compile import build_cpu, wanted_machines

        machines = wanted_machines()
        build_cpu(machines)
        if len(machines) == 1:
            build_data["tag"] = f"py3-none-linux_{machines[0]}"
        build_data["pure_python"] = len(machines) > 1

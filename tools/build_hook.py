"""Hatch's build hook: compiles the code objects into the package before it is packed.

What this machine needs, or what HIPQUANT_TARGETS names (`all`, `"gfx1100 sm_90a cpu"`); what is up to date is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CodeObjectsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs `hipquant.toolchain.build.build` from the source tree."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        from hipquant.targets import RUNTIMES, CpuTarget
        from hipquant.toolchain.build import build
        from hipquant.toolchain.compile import FACTS, MANIFEST, CompileError
        from hipquant.toolchain.machine import wanted

        try:
            targets = wanted()
            self.app.display_info(f"compiling for {' '.join(t.name for t in targets)}")
            files = [path.name for path in build(targets, engine=True)]
        except (ValueError, CompileError) as error:
            self.app.abort(str(error))
        # Nothing else that lies there, as it may be older than its sources.
        build_data["artifacts"] += [f"/src/hipquant/codeobjects/{name}" for name in (*files, MANIFEST, FACTS)]
        machines = {t.machine for t in targets if isinstance(t, CpuTarget)}
        build_data["pure_python"] = machines in (set(), set(RUNTIMES))
        if not build_data["pure_python"]:  # the wheel runs on these machines only
            build_data["tag"] = "py3-none-" + ".".join(f"linux_{machine}" for machine in sorted(machines))

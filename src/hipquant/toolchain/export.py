"""Puts the AMD bundle where a framework embeds it: for rocm-rs as a Rust constant, for C as an array.

The bundle is verified against the wiring table first. What is written names the kernels and checks itself where it is
compiled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import __version__
from ..codeobjects import QUANTIZED
from ..codeobjects.bundle import MAGIC, pack, unpack
from ..errors import InvalidCodeObjectError
from ..targets import AMD_TARGETS, GpuTarget
from .build import build
from .compile import Progress, write
from .inspect import inspect
from .verify import check, required_names

KINDS = ("rocm-rs", "c")
BUNDLE = "quantized.hsaco"
REPORTED = 3  # findings that the error of a bundle with errors names


def amd_bundle(
    targets: Sequence[GpuTarget] = AMD_TARGETS, profile: str = "hip", progress: Progress | None = None
) -> bytes:
    """The bundle of some AMD targets under a name profile; what the installation does not hold is compiled."""
    objects: dict[str, bytes] = {}
    if profile == "hip":
        objects = {t.name: path.read_bytes() for t in targets if (path := QUANTIZED.path(t.filename))}
    missing = [t for t in targets if t.name not in objects]
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            files = build(missing, Path(folder), profile=profile, progress=progress)
            objects |= {path.stem: path.read_bytes() for path in files}
    return pack(objects)


def export(kind: str, folder: Path, bundle: bytes, profile: str = "hip") -> list[Path]:
    """Writes the bundle and what embeds it; gives the files.

    Raises `InvalidCodeObjectError` if the bundle does not pass `verify`: nothing is written then.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of export {kind!r}; there are {', '.join(KINDS)}")
    findings = [f for f in check(inspect(bundle, BUNDLE), profile) if f.severity == "error"]
    if findings:
        first = "; ".join(" ".join(filter(None, (f.target, f.kernel, f.message))) for f in findings[:REPORTED])
        more = f" and {len(findings) - REPORTED} more" if len(findings) > REPORTED else ""
        raise InvalidCodeObjectError(f"not exported, {BUNDLE} does not pass verify: {first}{more}")
    names, targets = required_names(profile), sorted(unpack(bundle))
    files = _rocm_rs(names, targets) if kind == "rocm-rs" else _c(names, targets)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write(folder / name, text.encode())
    write(folder / BUNDLE, bundle)
    return [folder / name for name in (BUNDLE, *files)]


def _rocm_rs(names: Sequence[str], targets: Sequence[str]) -> dict[str, str]:
    stub = _RUST.format(
        origin=_origin(names, targets),
        bundle=BUNDLE,
        magic=MAGIC.decode(),
        targets=_lines(f'"{t}",' for t in targets),
        count=len(names),
        names=_lines(f'"{n}",' for n in names),
    )
    how = (
        "Put the files side by side, say `mod quantized_stub;`, and give `quantized_stub::QUANTIZED` to"
        " `hipModuleLoadData`.\n`cargo test` checks that every kernel of `quantized_stub::KERNELS` is in it.\n"
    )
    return {"quantized_stub.rs": stub, "README.md": _readme(names, targets, how)}


def _c(names: Sequence[str], targets: Sequence[str]) -> dict[str, str]:
    origin = _origin(names, targets)
    header = _HEADER.format(origin=origin, names=" \\\n    ".join(f"X({n})" for n in names), count=len(names))
    how = (
        "Compile `quantized.c` with gcc or clang and `-I` of this folder (or `-DQUANTIZED_HSACO='\"path\"'`),\n"
        "include `quantized.h`, and give `quantized` to `hipModuleLoadData`.\n"
    )
    source = _SOURCE.format(origin=origin, bundle=BUNDLE)
    return {"quantized.h": header, "quantized.c": source, "README.md": _readme(names, targets, how)}


def _origin(names: Sequence[str], targets: Sequence[str]) -> str:
    return f"{len(names)} kernels for {len(targets)} AMD targets, exported by hipquant {__version__}"


def _readme(names: Sequence[str], targets: Sequence[str], how: str) -> str:
    return (
        f"# {BUNDLE}: {_origin(names, targets)}\n"
        f"Targets: {' '.join(targets)}.\n{how}"
        f"Arguments and registers: `hipquant inspect {BUNDLE} --kernel NAME`; launch geometry: `hipquant.wiring`.\n"
    )


def _lines(words: Iterable[str]) -> str:
    return "\n    ".join(words)


_RUST = """\
// {origin}.

/// The code object: one offload bundle with every target, as `hipModuleLoadData` takes it.
pub const QUANTIZED: &[u8] = include_bytes!("{bundle}");

/// The targets in the bundle.
pub const TARGETS: &[&str] = &[
    {targets}
];

/// The names of the kernels that each target has.
pub const KERNELS: [&str; {count}] = [
    {names}
];

const MAGIC: &[u8] = b"{magic}";

const _: () = {{
    assert!(!QUANTIZED.is_empty(), "{bundle} is empty");
    assert!(QUANTIZED.len() > MAGIC.len(), "{bundle} is truncated");
    let mut i = 0;
    while i < MAGIC.len() {{
        assert!(QUANTIZED[i] == MAGIC[i], "{bundle} is not an offload bundle");
        i += 1;
    }}
}};

#[cfg(test)]
mod tests {{
    use std::collections::HashMap;

    #[test]
    fn every_kernel_is_in_every_target() {{
        let mut times: HashMap<&[u8], usize> = HashMap::new();
        for word in super::QUANTIZED.split(|b| !(b.is_ascii_alphanumeric() || *b == b'_')) {{
            *times.entry(word).or_default() += 1;
        }}
        for name in super::KERNELS {{
            let found = times.get(name.as_bytes()).copied().unwrap_or(0);
            assert!(found >= super::TARGETS.len(), "{{name}} is not in every target");
        }}
    }}
}}
"""

_HEADER = """\
// {origin}.
#pragma once
#include <stddef.h>

#ifdef __cplusplus
extern "C" {{
#endif
// The code object: one offload bundle with every target, as hipModuleLoadData takes it. quantized.c defines it.
extern const unsigned char quantized[];
extern const unsigned char quantized_end[];
#ifdef __cplusplus
}}
#endif
#define QUANTIZED_SIZE ((size_t)(quantized_end - quantized))  // bytes

// The names of the {count} kernels that each target has: X(name) for each.
#define QUANTIZED_KERNELS(X) \\
    {names}
"""

_SOURCE = """\
// {origin}.
#include "quantized.h"

#ifndef QUANTIZED_HSACO
#define QUANTIZED_HSACO "{bundle}"
#endif

__asm__(
    ".pushsection .rodata\\n"
    ".balign 4096\\n"
    ".globl quantized\\n"
    "quantized:\\n"
    ".incbin \\"" QUANTIZED_HSACO "\\"\\n"
    ".globl quantized_end\\n"
    "quantized_end:\\n"
    ".if quantized_end - quantized < 32\\n"
    ".error \\"{bundle} is empty or truncated\\"\\n"
    ".endif\\n"
    ".popsection\\n");
"""

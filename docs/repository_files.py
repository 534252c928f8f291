"""For the site: pages link to files of the repository as on a checkout, also to those outside docs/.

These become part of the site, at their own places, and links between the two follow them: docs/cpu.md is the page
cpu.md, and bench/results/losses.md stays bench/results/losses.md.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = ("CONTRIBUTING.md", "bench/results")
"""What pages link to outside docs/."""

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
_ENTRY = re.compile(r"^::: (\S+)(?: as (\S+))?(?:\n    options:)?$", re.MULTILINE)
_FENCED = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)


def on_files(files, config):
    """Add the files outside docs/."""
    for name in OUTSIDE:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between places of the repository into links between places of the site, and give each entry of the
    reference (`::: path as name`, or `::: path` where they are the same) its name as heading.
    """
    here = page.file.src_uri
    outside = here.startswith(OUTSIDE)
    folder = posixpath.dirname(here if outside else f"docs/{here}")

    def linked(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[1]))
        place = posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(here) or ".")
        return place + (found[2] or "")

    def headed(found: re.Match) -> str:
        name = found[2] or found[1]
        return f"::: {found[1]}\n    options:\n      heading: {name}\n      toc_label: {name}"

    parts = _FENCED.split(markdown)
    parts[::2] = (_ENTRY.sub(headed, _LINK.sub(linked, part)) for part in parts[::2])
    return "".join(parts)

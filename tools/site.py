"""A hook of mkdocs: pages stand where they are read in the repository too, and what they link to comes along.

``README.md`` is the index, ``docs/X`` is ``X``, and any other file that a page links to has the path that it has in the
repository. So each link is right in both places.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|<)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the README, and all that pages link to."""
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files)]
    known = set(waiting)
    while waiting:
        source = waiting.pop()
        if files.get_file_from_path(_place(source)) is None:
            files.append(File.generated(config, _place(source), abs_src_path=str(ROOT / source)))
        if source.endswith(".md"):
            found = {_target(source, link) for link in _LINK.findall((ROOT / source).read_text())} - known
            files_there = {target for target in found if (ROOT / target).is_file()}
            waiting += files_there
            known |= files_there
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of a page in the repository into those of the site."""
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        return posixpath.relpath(_place(_target(source, link[1])), here or ".")

    return _LINK.sub(moved, markdown)


def _target(source: str, link: str) -> str:
    """The path in the repository that a link of the page ``source`` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _place(source: str) -> str:
    """Where a file of the repository is in the site."""
    return "index.md" if source == "README.md" else source.removeprefix("docs/")

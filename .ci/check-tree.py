#!/usr/bin/env python3
"""Checks of the tracked text: links between documents, recipes that documents name, names that must not be here.

    check-tree.py                   all checks
    check-tree.py --command NAME    print the command that follows `<!-- command: NAME -->` in README.md
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# paths of one machine; put together here so that this file does not hold them
MACHINE_PATHS = ["/" + "work/", "/" + "tmp/wt-", "/" + "tmp/target", "/" + "tmp/models", "/" + "root/"]


def command(name):
    """The one line of the fenced block after the marker."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(rf"<!-- command: {re.escape(name)} -->\n```sh\n([^\n]+)\n```", text)
    if len(blocks) != 1:
        sys.exit(f"README.md: {len(blocks)} commands are marked `{name}`, one is wanted")
    return blocks[0]


def tracked():
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, names.decode().split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data[:8192]:
            yield name, data.decode("utf-8", "replace")


def anchors(text):
    """Headings of a document, as a renderer names them."""
    heads = re.findall(r"^#+ +(.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def problems():
    files = dict(tracked())
    recipes = set(re.findall(r"^([a-z][\w-]*)(?: [^\n:]*)?:(?!=)", files.get("justfile", ""), re.M))
    for name, text in files.items():
        for number, line in enumerate(text.splitlines(), 1):
            for path in MACHINE_PATHS:
                if path in line:
                    yield f"{name}:{number}: path of one machine: {path}"
        if not name.endswith(".md"):
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            to = (ROOT / name).parent / path if path else ROOT / name
            if not to.exists():
                yield f"{name}: link to {target}, which is not there"
            elif anchor and anchor not in anchors(to.read_text()):
                yield f"{name}: link to {target}: no such heading"
        for recipe in re.findall(r"`just ([a-z][\w-]*)", text):
            if recipe not in recipes:
                yield f"{name}: `just {recipe}` is no recipe of the justfile"
    for name in "convert", "test":
        command(name)


def main():
    if sys.argv[1:2] == ["--command"]:
        print(command(sys.argv[2]))
        return
    found = list(problems())
    print("\n".join(found) or "links, recipes and paths: fine")
    sys.exit(bool(found))


main()

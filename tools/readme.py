"README.md from nbs/index.ipynb, with paths from the repository's root; --check only compares them"

import base64
import json
import posixpath
import re
import sys
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
LINK = re.compile(r"""(\]\(|\b(?:src|href)=["'])(?![a-z]+:|[#/])([^)"'\s]+)""")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.M | re.S)


def relink(text: str, new: Callable[[str], str]) -> str:
    "Markdown with its local links rewritten; what stands in code is no link"
    parts = CODE.split(text)  # code at the odd places
    parts[::2] = [LINK.sub(lambda m: m[1] + new(m[2]), part) for part in parts[::2]]
    return "".join(parts)


def from_root(text: str) -> str:
    "Markdown whose links were relative to nbs/"
    return relink(text, lambda path: posixpath.normpath(f"nbs/{path}"))


def output_text(output: dict, picture: str, pictures: dict[str, bytes]) -> str:
    "One stored output as GitHub can show it; it shows no scripts, players or widgets"
    data = {
        kind: "".join(value)
        for kind, value in output.get("data", {}).items()
        if kind.startswith(("text/", "image/"))
    }
    if output.get("name") == "stdout":
        return f"```\n{''.join(output['text']).rstrip()}\n```"
    if "image/png" in data:
        pictures[picture] = base64.b64decode(data["image/png"])
        return f"![]({picture})"
    if "text/markdown" in data:
        return from_root(data["text/markdown"])
    if "<table" in data.get("text/html", ""):
        return re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.S)
    return f"```\n{data['text/plain']}\n```" if data.keys() == {"text/plain"} else ""


def readme() -> tuple[str, dict[str, bytes]]:
    "The text, and the pictures among the outputs by their paths"
    parts, pictures = [], {}
    for cell in json.loads((REPO / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        flags = re.findall(r"^#\|\s*(.+?)\s*$", source, re.M) if cell["cell_type"] == "code" else []
        if cell["cell_type"] == "raw" or "hide" in flags:
            continue
        if cell["cell_type"] == "markdown":
            parts.append(from_root(source.strip()))
            continue
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        if code and "echo: false" not in flags:
            parts.append(f"```python\n{code}\n```")
        parts += [
            output_text(o, f"nbs/images/readme-{len(pictures) + 1}.png", pictures) for o in cell["outputs"]
        ]
    return "\n\n".join(filter(None, parts)) + "\n", pictures


def main():
    text, pictures = readme()
    files = {"README.md": text.encode()} | pictures
    stale = [
        name
        for name, data in files.items()
        if not (REPO / name).exists() or (REPO / name).read_bytes() != data
    ]
    if "--check" in sys.argv[1:]:
        sys.exit(f"not what nbs/index.ipynb gives: {', '.join(stale)}; run `make format`" if stale else 0)
    for name in stale:
        (REPO / name).parent.mkdir(exist_ok=True)
        (REPO / name).write_bytes(files[name])


if __name__ == "__main__":
    main()

"Plain words: what HOUSE.md and the glossary in CONTRIBUTING.md retired appears nowhere that a reader looks"

import ast
import contextlib
import importlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
LIBRARY = REPO / "diffuspeech"
CARDS = sorted((LIBRARY / "assets/models").rglob("README.md"))
PRESETS = sorted((LIBRARY / "assets/presets").glob("*.json"))

# Words that no name contains: `speaker_twin` and `TwinSpeaker` fail, `twine` does not
IN_NAMES = {
    "room": "module, allowed import",
    "door": "entry point",
    "house": "architecture",
    "twin": "baseline, copy, branch",
    "hear": "transcribe",
    "heard": "transcript",
    "deaf": "encoder_only",
    "heed": "attend",
    "aside": "what is kept, and where",
    "blamed": "what failed",
    "donor": "source",
    "knob": "option",
    "ink": "style",
    "want": "need",
    "odd": "unexpected",
    "familiar": "known",
    "pace": "schedule",
    "say": "synthesize",
    "said": "transcript",
    "send": "encode",
    "sent": "encoded",
    "spoil": "corrupt",
    "tell": "cross_kv",
    "wide": "up_proj",
    "brute": "brute_force",
    "recogniser": "asr",
    "normalise": "normalize",
    "analyse": "analyze",
    "synthesise": "synthesize",
    "colour": "color",
    "licence": "license",
}
# Whole names (of functions, classes, parameters, attributes) that meant nothing to a stranger
WHOLE_NAMES = set(
    """ask back way_out goes_round laid_along kept_rhythm end_to_end in_turn in_turns Made Spoken Written
    Walked Grown Deaf Counting OnProcessors audible awake amused speakable listeners letters_to_sound
    letters_wrong hold_end made_up make_once misplaced verdict what_is_left whole wer_three_ways within_one
    work write_aside voiceless lively nobody breath asked asked_a_step at_home few theirs ours hear letters
    voiceprint kept thin
    """.split()
)
# Phrases that no help, README, heading or card contains
IN_TEXTS = [
    r"rooms? (may|imports?)",
    r"front door",
    r"house rules?",
    r"twins?",
    r"way out",
    r"donors?",
    r"knobs?",
    r"blamed",
    r"aside",
    r"deaf",
    r"heeds?",
    r"wants?",
    r"wanted",
    r"odd",
    r"familiar",
    r"laid along",
    r"goes round",
    r"kept rhythm",
    r"spoken again",
    r"said again",
    r"inks?",
]
# In help and error messages also the verbs for which the field has exact ones: synthesize, transcribe, encode
IN_MESSAGES = [*IN_TEXTS, "say", "says", "said", "send", "sends", "sent", "heard", "hear", "hears"]

# Innocent uses, each with its reason
ALLOWED = {
    "licence": "the field `licence` of manifests that users have",
    "recogniser": "a key in config.json of committed TASTE checkpoints, and the name of a preset",
    "from_recogniser": "as the key `recogniser`",
    "recogniser_name": "as the key `recogniser`",
}


def parts_of_name(name: str) -> list[str]:
    "`TwinSpeaker_knobs` -> twin, speaker, knob"
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return [singular for word in found for singular in (word.lower(), word.lower().removesuffix("s"))]


def retired_name(name: str) -> str | None:
    "Why a name is refused"
    if name in ALLOWED:
        return None
    if name in WHOLE_NAMES:
        return f"'{name}' tells a stranger nothing"
    words = [word for word in parts_of_name(name) if word in IN_NAMES]
    return f"'{name}': not '{words[0]}' but {IN_NAMES[words[0]]}" if words else None


def retired_phrases(text: str, patterns: list[str]) -> list[str]:
    "The retired phrases in a text, with what stands around them"
    found = []
    for pattern in patterns:
        for m in re.finditer(rf"(?<![\w./-]){pattern}(?![\w/-])", text, re.IGNORECASE):
            found.append(" ".join(text[max(m.start() - 40, 0) : m.end() + 40].split()))
    return found


MODULES = [p for p in sorted(LIBRARY.rglob("*.py")) if p.name != "_modidx.py"]


def public_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    "Functions, classes, parameters, constants and attributes, with their lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        if isinstance(node, ast.ClassDef | ast.Module):
            yield from assigned_names(node)


def assigned_names(node: ast.ClassDef | ast.Module) -> Iterator[tuple[str, int]]:
    "Fields of a class, constants of a module"
    for line in node.body:
        targets = line.targets if isinstance(line, ast.Assign) else []
        targets = [line.target] if isinstance(line, ast.AnnAssign) else targets
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    yield name.id, line.lineno


def messages(tree: ast.Module) -> Iterator[tuple[str, int]]:
    "The words of every error that is raised"
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value, part.lineno


def test_the_check_finds_what_it_is_for():
    assert retired_name("speaker_twin") and retired_name("Knobs") and retired_name("way_out")
    assert not retired_name("twine") and not retired_name("cross_kv") and not retired_name("AudioBytes")
    assert retired_phrases("the AR twin", IN_TEXTS) and not retired_phrases("twining", IN_TEXTS)
    code = "class Made:\n    donor: int\n    def f(self, deaf): self.tell = 1\n"
    assert {"Made", "donor", "deaf", "tell"} <= {name for name, _ in public_names(ast.parse(code))}
    assert [text for text, _ in messages(ast.parse("raise ValueError(f'{x} is wanted')"))] == [" is wanted"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(LIBRARY).as_posix())
def test_identifiers(path):
    "No retired word in what a module is called, or in what it defines"
    names = [(path.stem, 0), *public_names(ast.parse(path.read_text()))]
    found = {f"line {line}: {why}" for name, line in names if (why := retired_name(name))}
    assert not found, f"{path.relative_to(REPO)}: " + "; ".join(sorted(found))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(LIBRARY).as_posix())
def test_error_messages(path):
    found = [
        f"line {line}: {phrase}"
        for text, line in messages(ast.parse(path.read_text()))
        for phrase in retired_phrases(text, IN_MESSAGES)
    ]
    assert not found, f"{path.relative_to(REPO)}: {found}"


def help_text(*verbs: str) -> str:
    "What `diffuspeech VERB --help` prints"
    main = importlib.import_module("diffuspeech.cli").main
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*verbs, "--help"]) == 0
    return out.getvalue()


def test_command_line_help():
    commands = importlib.import_module("diffuspeech.cli").all_commands()
    assert len(commands) > 8
    for text in [help_text(), *(help_text(*name.split()) for name in commands)]:
        assert not (found := retired_phrases(text, IN_MESSAGES)), found


def headings(path: Path) -> list[str]:
    "The headings of a notebook or a Markdown file"
    if path.suffix == ".md":
        return re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    cells = json.loads(path.read_text())["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


NOTEBOOKS = [
    p
    for p in sorted((REPO / "nbs").rglob("*.ipynb"))
    if not {".ipynb_checkpoints", "index.ipynb"} & set(p.parts)
]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(REPO / "nbs").as_posix())
def test_headings_of_the_docs(path):
    found = [title for title in headings(path) if retired_phrases(title, IN_MESSAGES)]
    assert not found, f"{path.relative_to(REPO)}: {found}"


@pytest.mark.parametrize("kind", ["README", "cards", "presets"])
def test_texts_of_readme_cards_and_presets(kind):
    paths = {"README": [REPO / "README.md"], "cards": CARDS, "presets": PRESETS}[kind]
    assert paths
    for path in paths:
        assert not (found := retired_phrases(path.read_text(), IN_TEXTS)), f"{path.name}: {found}"


TESTS = sorted((REPO / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.relative_to(REPO / "tests").as_posix())
def test_names_of_tests(path):
    tree = ast.parse(path.read_text())
    names = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    found = [name for name in names if retired_phrases(name.replace("_", " "), IN_MESSAGES)]
    assert not found, f"{path.relative_to(REPO)}: {found}"

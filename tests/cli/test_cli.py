"The command line: what is offered, what is refused and in which words, and what the exit status tells"

import ast
import dataclasses
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from diffuspeech import cli
from diffuspeech.base.pretrained import MissingDependency
from diffuspeech.cli import all_commands, commands_of, main, verb_names
from diffuspeech.cli.options import SHARED, Option, output_path
from diffuspeech.cli.output import print_summary, print_table

COMMANDS = all_commands()
SOURCES = Path(cli.__file__).parent


def options() -> list[tuple[str, Option]]:
    "Every option of every command"
    return [(name, option) for name, command in COMMANDS.items() for option in command.all_options]


# ---- what is offered


def test_without_a_verb_all_verbs_are_listed_by_purpose(capsys):
    assert main([]) == main(["--help"]) == 0
    output = capsys.readouterr().out
    for purpose, verbs in cli.VERBS.items():
        assert f"\n{purpose}:\n" in output
        for verb in verbs:
            assert re.search(rf"^  {verb} +\w", output, re.M)
    assert max(map(len, output.splitlines())) <= 80
    modules = {p.stem for p in SOURCES.glob("*.py")} - {"__init__", "options", "output", "decoders"}
    assert modules == set(verb_names())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_in_80_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*name.split(), "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: diffuspeech {name}") and max(map(len, output.splitlines())) <= 80
    assert "\nExamples:\n" in output and "\nOther:\n" in output and "  " not in output.splitlines()[0]
    for option in COMMANDS[name].all_options:
        if not (option.is_argument or option.required or option.flag or option.many):
            assert option.default is not None or option.unset, f"{option.name}: what is its default?"


@pytest.mark.parametrize("name, example", [(n, e) for n, c in COMMANDS.items() for e in c.examples])
def test_examples_can_be_typed(name, example):
    program, *words = shlex.split(example)
    found, command, rest = cli.find_command(words)
    assert program == "diffuspeech" and found == name and len(example) <= 78
    command.parser(name).parse(rest)


def test_one_option_means_one_thing():
    "Type, default and the beginning of the help are the same in all verbs; a default may only be left open"
    for name, option in options():
        if (table := SHARED.get(option.name)) is None:
            continue
        assert option.names == table.names and option.type is table.type, f"{name} {option.name}"
        assert option.help.startswith(table.help) and option.default in (table.default, None)
        assert set(option.choices) <= set(table.choices)
        assert (option.many, option.flag) == (table.many, table.flag)
    found = defaultdict(set)
    for _, option in options():
        if option.name not in SHARED:
            found[option.name].add(option)
    assert not {name for name, kinds in found.items() if len(kinds) > 1}, "several meanings of one name"


def test_what_is_written_is_an_output_path():
    "One function sees every path that a verb writes to"
    for name, command in COMMANDS.items():
        for title, group in command.options.items():
            for option in group:
                assert bool(option.writes) == (option.type is output_path), f"{name} {option.name}"
                assert (title == "Output") == bool(option.writes or option.name == "--overwrite"), name
        written = [option for option in command.all_options if option.writes]
        assert bool(written) == ("--overwrite" in {option.name for option in command.all_options}), name


def read_attributes(path: Path) -> set[str]:
    "x of every `args.x`"
    nodes = ast.walk(ast.parse(path.read_text()))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }


@pytest.mark.parametrize("verb", verb_names())
def test_every_option_is_read_and_every_value_read_is_an_option(verb):
    own, shared = read_attributes(SOURCES / f"{verb}.py"), read_attributes(SOURCES / "decoders.py")
    shared |= {"steps", "sampler", "trajectory", "temperature", "top_k", "top_p"}  # by getattr
    shared |= {"overwrite", "output", "json", "original", "waves"}  # by the gate
    offered = {
        option.name.removeprefix("--").replace("-", "_")
        for command in commands_of(verb).values()
        for option in command.all_options
    }
    assert own <= offered <= own | shared


def test_help_agrees_with_the_library():
    from diffuspeech.data.builtin import PLANS
    from diffuspeech.models.reconstructor import AR_TEMPERATURE, LENGTH_MODES
    from diffuspeech.train.plan import GPUS
    from diffuspeech.voice.codec import SpeechCodec
    from diffuspeech.voice.cosyvoice import CosyVoice

    of = {(name, option.name): option for name, option in options()}
    assert set(SHARED["--length"].choices) == set(LENGTH_MODES)
    assert set(of["corpus build", "size"].choices) == set(PLANS)
    assert set(re.findall(r"\w*\d+\w*", of["plan", "--gpu-type"].help)) == set(GPUS)
    assert str(AR_TEMPERATURE) in SHARED["--temperature"].unset
    for codec in (SpeechCodec, CosyVoice):
        default = inspect.signature(codec.decode).parameters["steps"].default
        assert of["decode", "--flow-steps"].unset == str(default)


def test_help_is_light():
    code = (
        "import sys; from diffuspeech.cli import all_commands\n"
        "for name, command in all_commands().items(): command.parser(name).format_help()\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- what is not understood


@pytest.mark.parametrize(
    "words, message",
    [
        ("encod a.wav", "diffuspeech: encod: no such verb; the nearest is encode"),
        ("--json encode", "diffuspeech: --json: the verb comes first"),
        ("corpus", None),
        ("corpus --json x", "diffuspeech corpus: one of build, check, pack, prepare, questions comes first"),
        (
            "corpus biuld",
            "diffuspeech corpus: biuld is not one of build, check, pack, prepare, questions; "
            "the nearest is build",
        ),
        (
            "bench lwa",
            "bench: lwa is not one of sampler, vocabulary, decoder, training, law; the nearest is law",
        ),
        ("encode a.wav --outptu x", "diffuspeech encode: --outptu: no such option; the nearest is --output"),
        ("encode a.wav --out x", "no such option; the nearest is --output"),
        ("encode a.wav --codecs=small -o x", "--codecs: no such option; the nearest is --codec"),
        ("encode a.wav", "diffuspeech encode: the following arguments are required: -o/--output"),
        ("encode -o x", "required: IN"),
        ("encode a.wav -o", "-o/--output: expected one argument"),
        ("encode a.wav -o ''", "-o/--output: the name of a file or folder is needed"),
        ("corpus check m.jsonl --codec small", "diffuspeech corpus check: --codec: no such option"),
        ("corpus pack m.jsonl", "required: --license"),
        ("corpus build huge", "'huge' is not one of small, tiny"),
        ("corpus prepare m.jsonl --workers 0", "--workers: 0 should be a whole number of at least 1"),
        ("corpus prepare m.jsonl --speed-copies nan", "nan should be a number of at least 0 and at most 1"),
        ("synthesize hello world -o x.wav", "world: not understood; quote a text that has spaces"),
        ("synthesize hello -o x.wav --length gven", "'gven' is not one of ratio, predicted, eos"),
        ("synthesize hello -o x.wav --steps 1e9", "'1e9' is not a whole number"),
        ("synthesize hello -o x.wav --temperature inf", "inf should be a number of at least 0"),
        ("synthesize hello -o x.wav --seed -1", "-1 should be a whole number of at least 0"),
        ("train ddm --device gpu", "'gpu' is not one of auto, cpu, cuda"),
        ("plan ddm --gpus 0", "0 should be a whole number of at least 1"),
        (
            "evaluate external --bundled",
            "diffuspeech evaluate external: the following arguments are required: --waves",
        ),
        ("evaluate external --waves x --student x", "--student: no such option"),
        ("evaluate speech --protocol x", "--protocol: no such option"),
        ("evaluate speech --mos-clips 1", "1 should be a whole number of at least 2"),
        ("evaluate reconstruct --length eos", "--length: no such option"),
        ("bench decoder --samples 3", "diffuspeech bench decoder: --samples: no such option"),
        ("synthesize hello -o x.wav --steps 0", "--steps: 0 should be a whole number of at least 1"),
        (
            "synthesize hello -o x.wav --temperature nan",
            "--temperature: nan should be a number of at least 0",
        ),
    ],
)
def test_a_command_line_that_is_not_understood(words, message, capsys):
    status, output = main(shlex.split(words)), capsys.readouterr()
    if message is None:
        assert status == 0 and "KIND" in output.out
        return
    assert status == 2 and message in output.err and output.err.count("\n") == 1 and not output.out


def test_words_behind_two_dashes_are_no_options(capsys):
    assert main(["synthesize", "-o", "x.txt", "--", "--help"]) == 1
    assert "x.txt: the extension" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ("decode gone.jsonl -o out", "gone.jsonl: no such file"),
        ("encode x.wav -o o.jsonl --codec ./nowhere", "nowhere: no such folder"),
        ("train speech-tokns", "nearest is speech-tokens"),
        ("train speech-tokens --set stepz=1", "steps"),
        ("train speech-tokens --set steps", "key=value|="),
        ("fetch whisper-huge", "whisper-huge is none of .*; the nearest is whisper-base"),
        ("corpus check gone.jsonl", "gone.jsonl"),
        ("corpus pack m.jsonl --license L --codec small --workers 2", "--workers: with --codec one process"),
        ("decode t.jsonl -o out --codec mimi:x --seed 1", "--seed: only for codecs with a flow"),
        ("decode t.jsonl -o out --codec mimi:x --flow-steps 10", "--flow-steps: only for codecs with a flow"),
        ("judge gone.wav", "1 skipped"),
        ("plan ddn", "the nearest is ddm"),
        ("plan ddm --gpu-type h10", "the nearest is h100"),
        ("plan ddm --set options.taste.quantizer.dmi=3", "the nearest is options.taste.quantizer.dim"),
        ("plan ddm --set model.dmi=3", "dmi"),
        ("convert nothing.nemo -o x", "nothing.nemo"),
    ],
)
def test_one_line_for_what_cannot_be(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, error = main(shlex.split(words)), capsys.readouterr().err
    assert status == 1 and re.search(message, error) and "Traceback" not in error, error
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "words",
    [
        "ddm --set options.taste.quantizer.dim=3",
        "ar --set options.eos_padding=0.5",
        "ddm-few --set options.init_from=",
        "flow --set model.dim=wide",
        "dmd",
    ],
)
def test_plan_refuses_what_train_refuses(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    errors = []
    for verb in ("train", "plan"):
        assert main(shlex.split(f"{verb} {words}")) == 1
        errors.append(capsys.readouterr().err.removeprefix(f"diffuspeech {verb}: "))
    assert errors[0] == errors[1] and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "name, rest",
    [
        ("synthesize", "hello -o x.wav"),
        ("reconstruct", "a.wav -o x.wav"),
        ("bench decoder", ""),
        ("evaluate reconstruct", ""),
        ("train", "ddm"),
    ],
)
def test_a_gpu_that_is_not_there(name, rest, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(f"{name} {rest} --device cuda")) == 1
    assert capsys.readouterr().err == f"diffuspeech {name}: --device cuda: torch finds no GPU here\n"
    assert not list(tmp_path.iterdir())


# ---- what goes wrong while a verb runs


@pytest.fixture
def failing(monkeypatch):
    "failing(error): `diffuspeech encode` raises it"

    def make(error):
        def run(args):
            raise error

        commands = commands_of("encode")
        monkeypatch.setitem(commands, "encode", dataclasses.replace(commands["encode"], run=run))
        return ["encode", "a.wav", "-o", "x"]

    return make


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ValueError("a.wav: silent"), 1, "a.wav: silent"),
        (FileNotFoundError(2, "No such file or directory", "a.wav"), 1, "a.wav: no such file or directory"),
        (OSError("the disk is full"), 1, "the disk is full"),
        (FloatingPointError("step 3: the loss is not finite"), 1, "step 3: the loss is not finite"),
        (MissingDependency("whisper-base: not here"), 3, "whisper-base: not here"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 3, "the Python package x is missing"),
        (MemoryError(), 1, cli.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, cli.OUT_OF_MEMORY),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_of_the_user_is_one_line(error, status, message, failing, capsys):
    assert main(failing(error)) == status
    assert capsys.readouterr().err == f"diffuspeech encode: {message}\n"


def test_no_memory_on_the_processor_is_one_line(failing, capsys, monkeypatch):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert main(failing(caught.value)) == 1
    assert capsys.readouterr().err == f"diffuspeech encode: {cli.OUT_OF_MEMORY}\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        TypeError("x"),
        KeyError("x"),
        ModuleNotFoundError("No module named 'diffuspeech.x'", name="diffuspeech.x"),
    ],
)
def test_a_defect_keeps_its_traceback(error, failing):
    with pytest.raises(type(error)):
        main(failing(error))


def test_debug_shows_the_traceback_of_a_users_error(failing, capsys):
    words = failing(ValueError("a.wav: silent"))
    assert main([*words, "--debug"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("diffuspeech encode: a.wav: silent\n")


# ---- in a shell


def shell(script: str, folder: Path) -> subprocess.CompletedProcess:
    "A script in which $D is `python -m diffuspeech`"
    command = f"set -o pipefail; D='{sys.executable} -m diffuspeech'; {script}"
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)


def test_as_a_module(tmp_path):
    done = shell("$D --version && $D && $D encod", tmp_path)
    assert (
        done.returncode == 2 and done.stdout.startswith("diffuspeech 0.") and "Speech tokens:" in done.stdout
    )
    assert done.stderr == "diffuspeech: encod: no such verb; the nearest is encode\n"


@pytest.mark.parametrize("buffering", ["", "PYTHONUNBUFFERED=1"])
def test_a_closed_pipe_ends_quietly_and_loses_no_rows(buffering, tmp_path):
    done = shell(f"unset PYTHONUNBUFFERED; {buffering} $D plan duration --json plan.json | true", tmp_path)
    assert (done.returncode, done.stderr) == (141, "")
    assert json.loads((tmp_path / "plan.json").read_text())[0]["gpus"] == 1


def test_law_of_every_sampler(tmp_path):
    from diffuspeech.diffusion.catalogue import CATALOGUE

    done = shell("$D bench law --samples 1500 --json law.json", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "law.json").read_text())
    assert {r["rule"] for r in rows} == set(CATALOGUE)
    assert all({"rule", "steps", "tv", "keeps_law"} <= r.keys() for r in rows)
    broken = [r for r in rows if r["expected"] == "T" and not r["keeps_law"]]
    assert not broken


# ---- what is printed


def test_rows_of_different_columns_make_a_table(capsys):
    print_table([dict(id="a", transcript="one two"), dict(id="all", wer=0.5)])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["id", "transcript", "wer"],
        ["a", "one", "two"],
        ["all", "0.5"],
    ]
    print_table([])
    assert capsys.readouterr().out == "\n"


def test_the_last_lines_of_a_job(capsys):
    assert print_summary(3, [], "encoded", "out.jsonl") == 0
    assert capsys.readouterr().err == "3 encoded to out.jsonl, 0 skipped\n"
    assert print_summary(0, [f"{k}: silent" for k in range(70)], "encoded", "out.jsonl") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "skipped: 0: silent" and len(lines) == 52
    assert lines[-2:] == ["... and 20 more", "0 encoded, 70 skipped"]

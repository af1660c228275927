"Tasks, their options and presets: each error is one line that names what is wrong and the nearest right name"

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import diffuspeech
from diffuspeech.base.schema import from_dict
from diffuspeech.train import config
from diffuspeech.train.config import TrainConfig, list_presets, load_preset, merge
from diffuspeech.train.journal import history
from diffuspeech.train.loop import train, train_preset
from diffuspeech.train.plan import components
from diffuspeech.train.task import Task, Update, check_run, check_task, find_task, make_task, resolve_preset

ENV = os.environ | {"PYTHONPATH": str(Path(diffuspeech.__file__).parent.parent)}
OWN_IMPORTS = """import json
from dataclasses import dataclass

import torch
from torch import nn

from diffuspeech.train.config import from_dict
from diffuspeech.train.task import Task"""
RESOLVED = json.loads(Path(__file__).with_name("presets.json").read_text())


@dataclass(frozen=True)
class Width:
    width: int = 8


@dataclass(frozen=True)
class Rows:
    rows: int = 4  # of a batch
    shift: float = 1.0


class Line(Task):
    "Learns to add a number"

    Config, Options = Width, Rows

    def __init__(self, run):
        self.run, self.options = run, from_dict(Rows, run.options, "options")
        width = from_dict(Width, run.model, "model").width
        self.model = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))

    def batches(self, epoch):
        generator = torch.Generator().manual_seed(epoch)
        return list(torch.randn(5, self.options.rows, 1, generator=generator))

    def loss(self, batch, update):
        return {"loss": update.share((self.model(batch) - batch - self.options.shift).square().sum())}

    def validate(self, model):
        x = torch.linspace(-1, 1, 9)[:, None]
        return {"score": (model(x) - x - self.options.shift).square().mean()}

    def export(self, folder, **metadata):
        folder.mkdir(exist_ok=True)
        (folder / "about.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize("name", list_presets())
def test_each_preset_resolves_to_its_recorded_values(name):
    run = json.loads(json.dumps(dataclasses.asdict(load_preset(name))))
    assert run.pop("description") and run == RESOLVED[name]


def test_presets_hold_only_differences():
    "No value that is the default or the extended preset's"
    assert list_presets() == sorted(RESOLVED)
    defaults = {
        f.name: f.default for f in dataclasses.fields(TrainConfig) if f.default is not dataclasses.MISSING
    }
    for name in list_presets():
        values = json.loads((config.PRESETS / f"{name}.json").read_text())
        base = values.pop("extends", None)
        before = dataclasses.asdict(load_preset(base)) if base else defaults
        repeated = {key for key, value in flatten(values).items() if flatten(before).get(key, ...) == value}
        assert not repeated, (name, repeated)


def flatten(values, path=""):
    "{a: {b: 1}} -> {a.b: 1}, tuples as lists"
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{path}{name}.")
        else:
            found[path + name] = list(value) if isinstance(value, tuple) else value
    return found


@pytest.mark.parametrize("name", list_presets())
def test_the_task_of_each_preset_takes_all_its_values(name):
    run = resolve_preset(name)
    cls = check_task(find_task(run.task), run.task)
    check_run(run, cls)
    assert dataclasses.is_dataclass(cls.Options) and cls.Options.__dataclass_params__.frozen
    assert all(part.parameters > 0 for part in components(run)) if name != "vocoder" else True


def test_extends_merges_deep_and_refuses_cycles(tmp_path):
    def write(name, **values):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
        return str(tmp_path / f"{name}.json")

    write(
        "base", task="diffuspeech.x:Y", lr=0.5, model={"a": 1, "b": {"c": 2, "d": [1, 2]}}, betas=[0.5, 0.6]
    )
    write("middle", extends="base.json", model={"b": {"d": [3]}}, steps=7)
    run = load_preset(write("top", extends="middle.json", model={"b": {"e": 4}}, steps=9))
    assert (run.lr, run.steps, run.betas) == (0.5, 9, (0.5, 0.6))
    assert run.model == {"a": 1, "b": {"c": 2, "d": [3], "e": 4}}
    mine = load_preset(write("mine", extends="ddm", options={"taste": {"quantizer": {"layers": 2}}}))
    quantizer = {"kind": "fsq", "layers": 2, "structure": "grouped"}
    taste = {"rank": 8, "dim": 256, "value_layer": 2, "quantizer": quantizer}
    assert mine.options["taste"] == taste and mine.lr == load_preset("ddm").lr
    write("x", extends="y.json")
    write("y", extends="z.json")
    for values, words in (
        (dict(extends="x.json"), "z.json: extends itself: z -> x -> y -> z"),
        (dict(extends="z.json"), "extends itself: z -> z"),
        (dict(extends="dmd"), "z.json: dmd: no such preset; the nearest is ddm"),
        (dict(extends="w.json"), "w.json: no such file"),
        (dict(extends=3), "extends=3: should be a word"),
        (dict(extends="base.json", lrr=1), "z.json: lrr: no such field; the nearest is lr"),
        (dict(task="mine:Line"), "z.json: task=mine:Line: a file may only name diffuspeech's own"),
        (dict(lr=0.1), "z.json: task is missing"),
    ):
        with pytest.raises(ValueError, match=words):
            load_preset(write("z", **values))
    (tmp_path / "z.json").write_text("[1]")
    with pytest.raises(ValueError, match="z.json: should be a record of fields"):
        load_preset(str(tmp_path / "z.json"))
    base = {"a": {"b": 1}}
    assert merge(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}} and base == {"a": {"b": 1}}


def test_a_task_of_ones_own_by_name(tmp_path, monkeypatch):
    "module:Class from the working directory, in the place of a preset or over one"
    (tmp_path / "my_lines.py").write_text("from test_task import Line\n\n\nclass MyLine(Line):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    short = ["steps=20", "lr=0.05", "warmup_steps=1", "precision=fp32", "options.shift=2", "model.width=6"]
    metrics = train_preset("my_lines:MyLine", short, tmp_path / "run", "cpu", progress_bar=False)
    assert history(tmp_path / "run")["train"]["step"] == list(range(1, 21)) and "score" in metrics
    about = json.loads((tmp_path / "run/model/about.json").read_text())["run"]
    assert (about["task"], about["options"], about["model"]) == (
        "my_lines:MyLine",
        {"shift": 2},
        {"width": 6},
    )
    (tmp_path / "mine.json").write_text('{"lr": 0.25, "options": {"rows": 3}}')
    run = resolve_preset("mine.json", ["task=my_lines:MyLine", "steps=3"])
    assert (run.task, run.lr, run.options, run.steps) == ("my_lines:MyLine", 0.25, {"rows": 3}, 3)


def test_a_task_of_ones_own_from_a_shell(tmp_path):
    "The script `diffuspeech` stands in another folder, and the module in the working directory"
    script, work = tmp_path / "bin/diffuspeech", tmp_path / "work"
    for folder in (script.parent, work):
        folder.mkdir()
    script.write_text("import sys\nfrom diffuspeech.cli import main\n\nsys.exit(main())\n")
    lines = inspect.getsource(sys.modules[__name__]).split("\n\n\n")
    own = [piece for piece in lines if re.search(r"^class (Width|Rows|Line)\b", piece, re.M)]
    (work / "my_lines.py").write_text("\n\n\n".join([OWN_IMPORTS, *own]))
    settings = "--set steps=3 --set precision=fp32 --set options.shift=2".split()

    def shell(*words):
        return subprocess.run(
            [sys.executable, script, *words], cwd=work, env=ENV, capture_output=True, text=True, timeout=300
        )

    done = shell("train", "my_lines:Line", "--device", "cpu", *settings)
    assert done.returncode == 0 and "the model is in runs/Line/model" in done.stdout, done.stderr
    about = json.loads((work / "runs/Line/model/about.json").read_text())
    assert about["run"]["task"] == "my_lines:Line" and about["run"]["options"] == {"shift": 2}
    done = shell("train", "my_lines:Lime")
    message = "diffuspeech train: task=my_lines:Lime: my_lines has no Lime\n"
    assert (done.returncode, done.stderr) == (1, message)


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("dmd", [], "dmd: no such preset; the nearest is ddm, and there are: ar, ar-vectors"),
        ("nowhere.json", [], "nowhere.json: no such file"),
        ("flow", ["warmpu=3"], "warmpu: no such field; the nearest is warmup_steps"),
        ("flow", ["warmup_steps"], "warmup_steps: should be key=value"),
        ("flow", ["steps=many"], 'steps="many": should be a whole number'),
        ("flow", ["steps=true"], "steps=true: should be a whole number"),
        ("flow", ["steps.x=1"], "steps.x: steps has no parts"),
        ("flow", ["model.dimm=3"], "model.dimm: no such field; the nearest is model.dim"),
        ("flow", ["model.dim=wide"], 'model.dim="wide": should be a whole number'),
        ("flow", ['options={"speakr_dropout": 1}'], "options.speakr_dropout: no such field; the nearest is"),
        ("ddm", ["options.taste.kin=fsq"], "options.taste.kin: no such field"),
        (
            "ddm",
            ["options.taste.quantizer.levels=[8, x]"],
            "options.taste.quantizer.levels=.*should be a list of whole",
        ),
        ("ddm", ["options.taste.quantizer=fsq"], 'options.taste.quantizer="fsq": should be a record'),
        ("ddm", ["options.taste.quantizer.dim=3"], "should have a kind .* and no dim, which is the"),
        ("ddm-vectors", ["options.taste.quantizer.layers=2"], "should have a kind"),
        ("ar", ["options.eos_padding=0.5"], "options.eos_padding: only for diffusion decoders"),
        ("ddm-few", ["options.init_from="], "options.init_from: needs a diffusion decoder"),
        ("ddm-few", ["options.encoder=trained"], "options.encoder=trained: distillation leaves the encoder"),
        ("ddm-few", ["options.eos_padding=0.5"], "options.eos_padding: no such field"),
        ("ddm", ["options.condition_dropout=0.4"], "condition_dropout=0.4: should be from 0 to 1/3"),
        ("ddm", ["options.eos_padding_ratio=2"], "eos_padding_ratio=2.0: should be from 0 to 1"),
        ("flow", ["task=nowhere:X"], "task=nowhere:X: there is no module nowhere here"),
        ("test_task:Lime", [], "task=test_task:Lime: test_task has no Lime"),
        ("os:system", [], "task=os:system: should be a class, and this is a builtin"),
        ("torch.nn:Linear", [], "task=torch.nn:Linear: Linear lacks Config, Options, versions, read_options"),
    ],
)
def test_what_is_wrong_is_named(name, changes, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        train_preset(name, changes, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists(), "no folder is left behind"


def test_words_and_numbers_of_a_shell():
    run = resolve_preset("flow", ["lr=1", "betas=[0.9, 0.99]", "data=2024", "model.levels=[8, 8]"])
    assert (run.lr, run.betas, run.data, run.model) == (1.0, (0.9, 0.99), "2024", {"levels": [8, 8]})
    assert resolve_preset("flow").model == {}, "the preset itself stays as it was"


def test_what_a_task_lacks_is_named(tmp_path):
    for members, words in (
        ({"validate": None}, "lacks validate"),
        ({"loss": None, "batches": None}, "lacks batches, loss"),
        ({"loss": lambda self, batch: {}}, r"loss cannot be called as loss\(batch, update\)"),
        ({"loss": staticmethod(lambda self, batch, update: {})}, "loss cannot be called as"),
        ({"read_options": lambda self, run: None}, r"read_options cannot be called as read_options\(run\)"),
    ):
        cls = type("Broken", (Line,), members)
        with pytest.raises(ValueError, match=f"Broken.*{words}|Broken.{words}") as error:
            train(TrainConfig("mine:Broken"), tmp_path / "run", task=cls)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    for members, words in (
        ({"export": Task.export}, "Broken lacks export: its model is a Sequential"),
        ({"__init__": lambda self, run: None}, "Broken.model: should be a torch.nn.Module"),
    ):
        with pytest.raises(ValueError, match=words):
            make_task(TrainConfig("mine:Broken"), type("Broken", (Line,), members))


def test_a_class_that_does_not_derive_from_task(tmp_path):
    "It has all members by itself"
    names = [*vars(Line), "versions", "counts", "samples"]
    members = {name: getattr(Line, name) for name in names if name not in ("__dict__", "__weakref__")}
    members |= {name: classmethod(getattr(Task, name).__func__) for name in ("read_options", "components")}
    own = type("Own", (), {k: v for k, v in members.items() if not k.startswith("_abc")})
    assert not issubclass(own, Line)
    run = TrainConfig("mine:Own", steps=3, precision="fp32")
    assert "score" in train(run, tmp_path, "cpu", progress_bar=False, task=own)


def test_shares_add_up():
    update = Update(1, num_rows=4, totals={"tokens": 10.0, "none": 0.0})
    assert (
        update.share(torch.tensor(2.0)).item() == 0.5
        and update.share(torch.tensor(5.0), "tokens").item() == 0.5
    )
    assert update.share(torch.tensor(0.0), "none").item() == 0.0


class Tokens(Line):
    "Rows with different numbers of tokens, and two terms with denominators of their own"

    def __init__(self, run):
        super().__init__(run)
        torch.nn.init.constant_(self.model[0].weight, 0.3)
        self.x = torch.linspace(-2, 2, 8 * 5).view(8, 5)
        self.inside = torch.arange(5) < torch.tensor([1, 5, 2, 2, 4, 1, 3, 5])[:, None]

    def batches(self, epoch):
        return list(torch.arange(8).split(self.options.rows))

    def counts(self, batch, update):
        return {"tokens": int(self.inside[batch].sum())}

    def loss(self, batch, update):
        error = (self.model(self.x[batch][..., None])[..., 0] - self.x[batch] ** 2).square()
        tokens, first = (error * self.inside[batch]).sum(), error[:, 0].sum()
        return {"loss": update.share(tokens, "tokens") + update.share(first), "first": update.share(first)}


@pytest.mark.parametrize("rows", [4, 2, 1])
def test_the_loop_takes_the_same_steps_however_the_batch_is_cut(rows, tmp_path):
    "One batch of 8, or two of 4, four of 2, eight of 1 in an update"
    logs = []
    for n in (8, rows):
        run = TrainConfig("mine:Tokens", steps=6, warmup_steps=1, lr=0.01, ema_decay=0.0, precision="fp32")
        run = dataclasses.replace(run, options={"rows": n}, batches_per_update=8 // n)
        train(run, tmp_path / str(n), "cpu", progress_bar=False, task=Tokens)
        logs.append(history(tmp_path / str(n))["train"])
    for name in ("loss", "first", "grad_norm"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4), name

"The registered plan, from a run to a printed number: at the size `tiny`, with the code of every other size"

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published import FLOW, HIFT, small_campplus
from small import prepare_clips, save_random_models

from diffuspeech.cli import main
from diffuspeech.data.manifest import write_manifest
from diffuspeech.diffusion.catalogue import CATALOGUE, get_rule
from diffuspeech.evaluate.clips import load_bundled_clips
from diffuspeech.evaluate.metrics import Judges
from diffuspeech.evaluate.paper import COLUMNS, Measured, judge_finding, reported_numbers, table_rows
from diffuspeech.evaluate.paper_cells import Results
from diffuspeech.evaluate.paper_jobs import missing_jobs, read_runs, run_in_processes, run_jobs, train_run
from diffuspeech.evaluate.paper_plan import (
    MAX_MINUTES,
    plan_jobs,
    read_plan,
    repository_folder,
    train_config,
)
from diffuspeech.tokenizers.public import import_s3tokenizer, tiny_tokenizer
from diffuspeech.voice.cosyvoice import CosyVoice
from diffuspeech.voice.cosyvoice_flow import CosyFlow
from diffuspeech.voice.hift import Hift

FILE = repository_folder() / "plan.json"
PLAN = read_plan(FILE)
CELLS = ["ddm-no-vq", "ddm-4l-fsq", "steps-1", "rule-ancestral", "length-0.7"]  # one of each table and figure


def test_every_run_and_cell_of_the_plan_can_be_made():
    "Its presets, rules, columns and rows of the paper exist at every scale"
    for name, scale in PLAN.scales.items():
        for run in (run for run in PLAN.runs if run.decoder in scale.presets):
            config = train_config(PLAN, scale, run, 0, Path("runs"))
            assert config.seed == 0 and bool(config.options.get("init_from")) == bool(run.init), name
            assert scale.minutes[run.decoder][run.stage] <= MAX_MINUTES or name == "paper"
    for cell in PLAN.cells:
        for trial in cell.trials or ({},):
            assert get_rule(trial.get("rule", cell.rule))
        if cell.reported:
            assert reported_numbers(cell.reported, cell.splits[0]), cell.reported
    for table in PLAN.tables:
        assert set(table.columns) <= set(COLUMNS), table.name
    trials = {len(PLAN.cell(name).trials) for name in PLAN.table("figure2").cells}
    assert trials == {4}, "as many for each rule"
    rules = {PLAN.cell(name).rule for name in PLAN.table("figure2").cells}
    assert rules == set(CATALOGUE), "a rule that is new needs a cell"


def test_the_plan_answers_every_question_of_the_paper():
    assert len(PLAN.findings) == 9
    tables = {table.name for table in PLAN.tables}
    assert {"table1", "table2", "table3", "figure2", "figure3", "headline"} <= tables
    small = PLAN.scale("small")
    jobs = plan_jobs(PLAN, small)
    first = [job for job in jobs if job.tier == 1]
    assert all(job.within_budget for job in first), "four layers and three seeds come first"
    assert {job.seed for job in first} == {0, 1, 2} and all(job.minutes <= MAX_MINUTES for job in jobs)


def test_a_plan_that_does_not_hold_together(tmp_path):
    values = json.loads(FILE.read_text())

    def error(change):
        some = json.loads(json.dumps(values))
        change(some)
        (tmp_path / "plan.json").write_text(json.dumps(some))
        with pytest.raises(ValueError) as found:
            read_plan(tmp_path / "plan.json")
        return str(found.value)

    assert "runs[0].seed: no such field" in error(lambda v: v["runs"][0].update(seed=1))
    assert "no such run" in error(lambda v: v["cells"][2].update(run="ddm"))
    assert "has no test-other" in error(lambda v: v["findings"][6]["tests"][0].update(split="test-other"))
    assert "stands twice" in error(lambda v: v["cells"].append(v["cells"][0]))
    assert "is not a plan" in error(lambda v: v.update(format="other"))
    assert "scales is missing" in error(lambda v: v.pop("scales"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Trained from nothing, and measured: one cell of each table and figure"
    folder = tmp_path_factory.mktemp("tiny")
    scale, cells = PLAN.scale("tiny"), [PLAN.cell(name) for name in CELLS]
    results = Results(folder / "results")
    jobs = plan_jobs(PLAN, scale, cells)
    assert {job.run for job in jobs} == {"ddm-no-vq", "ddm-4l-fsq"} and jobs[0].kind == "train"
    run_jobs(jobs, PLAN, scale, folder / "runs", results, judged=folder / "judged", device="cpu")
    return folder, scale, results, jobs


def row_of(plan, scale, results, table, cell, split="test-clean"):
    rows = table_rows(Measured(plan, scale, results), plan.table(table))
    return next(row for row in rows if (row["cell"], row["split"]) == (cell, split))


def test_from_nothing_to_every_table(tiny):
    folder, scale, results, jobs = tiny
    for table, cell in zip(("table1", "table2", "table3", "figure2", "figure3"), CELLS):
        row = row_of(PLAN, scale, results, table, cell)
        assert row["seeds"] == 1 and row["minutes"] > 0 and not row["status"], cell
        column = "wer" if "wer" in row else "deletions"
        assert row[f"{column}_sentences_low"] <= row[column] <= row[f"{column}_sentences_high"]
        assert row[f"{column}_voices_low"] is not None and row[f"{column}_seeds"] == [row[column]]
    assert row_of(PLAN, scale, results, "table1", "ar-no-vq")["status"] == "not run"
    assert row_of(PLAN, scale, results, "table1", "ddm-no-vq")["WER % (reported)"] == 2.99
    assert row_of(PLAN, scale, results, "table3", "steps-1")["nfe"] == 1
    chosen = next(row for row in results.rows if row["cell"] == "rule-ancestral")
    assert len(chosen["trials"]) == 4 and chosen["chosen"]["temperature"] in (0.5, 0.7, 0.85, 1.0)
    word, evidence = judge_finding(Measured(PLAN, scale, results), PLAN.findings[1])
    assert word == "unclear" and {found.word for found in evidence} == {"not run"}
    lines = (results.folder / "runs.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("run,seed,config")
    kept = {path.name for path in (results.folder / "runs" / "ddm-no-vq-s0").iterdir()}
    assert kept == {"card.md", "config.json", "log.jsonl"}, "the weights stay where they were trained"


def test_a_rerun_does_nothing(tiny):
    folder, scale, results, jobs = tiny
    before = (results.folder / "rows.jsonl").read_bytes()
    assert missing_jobs(jobs, PLAN, scale, folder / "runs", results) == []
    run_jobs(jobs, PLAN, scale, folder / "runs", results, judges=None, device="cpu")
    assert (results.folder / "rows.jsonl").read_bytes() == before


def test_a_changed_row_changes_the_table(tiny):
    "The path from a run to a printed number: nothing in between is stored"
    folder, scale, results, _ = tiny
    file = results.clips_file("ddm-no-vq", 0)
    content = file.read_bytes()
    wer = row_of(PLAN, scale, results, "table1", "ddm-no-vq")["wer"]
    lines = gzip.decompress(content).decode().splitlines()
    number = next(i for i, line in enumerate(lines) if '"system"' in line and '"transcript"' in line)
    clip = json.loads(lines[number])
    clip["substitutions"] += 5
    lines[number] = json.dumps(clip)
    try:
        file.write_bytes(gzip.compress("\n".join(lines).encode()))
        rows, _ = results.clips(find(results, "ddm-no-vq"))
        words = sum(row["words"] for row in rows if row["split"] == "test-clean")
        changed = row_of(PLAN, scale, results, "table1", "ddm-no-vq")["wer"]
        assert changed == pytest.approx(wer + 100 * 5 / words, abs=1e-3)
    finally:
        file.write_bytes(content)
    assert row_of(PLAN, scale, results, "table1", "ddm-no-vq")["wer"] == wer


def find(results, cell):
    return next(row for row in results.rows if row["cell"] == cell)


def test_a_row_of_another_plan_is_not_used(tiny):
    _, scale, results, _ = tiny
    runs = tuple(replace(r, options={"lr": 0.5}) if r.name == "ddm-no-vq" else r for r in PLAN.runs)
    other = replace(PLAN, runs=runs)
    for table, cell in (("table1", "ddm-no-vq"), ("table2", "ddm-4l-fsq")):  # which starts from the first
        assert row_of(other, scale, results, table, cell)["status"] == "not run"


def test_a_job_that_is_out_of_time_goes_on_in_the_next(tiny, tmp_path):
    folder, scale, _, _ = tiny
    results = Results(tmp_path / "results")
    (tmp_path / "corpus").symlink_to(folder / "runs" / "corpus")
    scale = replace(scale, steps=scale.steps | dict(ar=[4, 4]))
    how = (PLAN, scale, "ar-no-vq", 0, tmp_path, results, "cpu")
    assert not train_run(*how, minutes=0), "a step, and the time is over"
    assert not (tmp_path / "ar-no-vq-s0" / "model").exists() and not (results.folder / "runs.csv").exists()
    assert train_run(*how) and train_run(*how)
    assert len((results.folder / "runs.csv").read_text().splitlines()) == 2


def test_what_fails_does_not_stop_the_rest(tiny, tmp_path):
    folder, scale, _, _ = tiny
    results = Results(tmp_path / "results")
    jobs = plan_jobs(PLAN, scale, [PLAN.cell(name) for name in ("original", "ar-no-vq")])
    evaluations = sorted(
        (job for job in jobs if job.kind == "evaluate"), key=lambda job: job.run, reverse=True
    )
    assert evaluations[0].run == "ar-no-vq", "the one that fails comes first"
    with pytest.raises(ValueError, match="1 not made: ar-no-vq seed 0: .*has not been trained"):
        run_jobs(evaluations, PLAN, scale, tmp_path, results, judged=folder / "judged", device="cpu")
    assert [row["cell"] for row in results.rows] == ["original"]


def test_several_at_once(tiny, tmp_path):
    "A second stage starts when its first is there; a job whose run is missing is named"
    folder, scale, _, _ = tiny
    results = Results(tmp_path / "results")
    (tmp_path / "corpus").symlink_to(folder / "runs" / "corpus")
    jobs = plan_jobs(PLAN, scale, [PLAN.cell(name) for name in ("ar-4l-rvq", "ddm-no-vq")])
    trainings = [job for job in jobs if job.kind == "train"]
    assert [job.run for job in trainings] == ["ar-no-vq", "ddm-no-vq", "ar-4l-rvq"]
    run_in_processes(trainings, PLAN, scale, tmp_path, results, 2, "cpu")
    assert missing_jobs(trainings, PLAN, scale, tmp_path, results) == []
    assert {row["run"] for row in read_runs(results)} == {job.run for job in trainings}
    lost = [job for job in plan_jobs(PLAN, scale, [PLAN.cell("ddm-2l-rvq")]) if job.kind == "evaluate"]
    with pytest.raises(ValueError, match="evaluate ddm-2l-rvq seed 0: needs a run that is not there"):
        run_in_processes(lost, PLAN, scale, tmp_path, results, 2, "cpu")


def test_the_command_prints_tables_in_seconds(tiny, capsys, monkeypatch, tmp_path):
    folder, _, results, _ = tiny
    monkeypatch.chdir(tmp_path)
    how = ["--scale", "tiny", "--results", str(results.folder), "-o", "out"]
    assert main(["paper", "table1", "--json", "t.json", *how]) == 0
    out, err = capsys.readouterr()
    assert "evaluations are missing" in err and "not made without --yes" in err
    assert "| DDM-No-VQ | test-clean | 1 |" in out and "| AR-No-VQ | test-clean |  | not run |" in out
    assert {path.suffix for path in (tmp_path / "out/tables").iterdir()} == {".md", ".csv", ".tex"}
    assert {row["table"] for row in json.loads((tmp_path / "t.json").read_text())} == {"table1"}
    assert main(["paper", "findings", *how]) == 0
    assert "Does it reproduce?" in capsys.readouterr().out
    assert main(["paper", "table4"]) == 2 and "the nearest is table" in capsys.readouterr().err


def test_the_paper_scale_is_costed(tmp_path, capsys):
    "Its minutes are the estimate of the operations that the paper's presets take"
    file = tmp_path / "plan.json"
    assert main(["paper", "plan", "--scale", "paper", "--json", str(file)]) == 0
    assert "gpu_hours" in capsys.readouterr().out
    rows = json.loads(file.read_text())
    for row in rows:
        if row.get("gpu_hours"):
            hours = row["gpu_hours"] / PLAN.scale("paper").gpus
            assert row["minutes"] == pytest.approx(60 * hours, rel=0.25), row
    trained = {row["parameters"] for row in rows if row["job"] == "train ddm-no-vq seed 0"}
    assert all(abs(count / 316e6 - 1) < 0.05 for count in trained), "the paper has about 316M"


class Judge:
    "One answer to every wave; the real judges are tested in test_judges.py"

    def __init__(self, answer):
        self.name, self.answer = f"constant-{type(answer).__name__}", answer

    def __call__(self, waves):
        return [self.answer] * len(waves)


def test_the_paper_scale_on_fakes(tmp_path):
    "The same code over a Canary whose encoder is trained, CosyVoice's tokens and voice, and other judges"
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    try:
        import_s3tokenizer()
    except ImportError as e:
        pytest.skip(str(e))
    torch.manual_seed(0)
    save_random_models(tmp_path)
    s3 = tiny_tokenizer("s3", name="speech_tokenizer_v1", n_codebook_size=64)
    voice = CosyVoice(CosyFlow(FLOW), Hift(HIFT), s3, small_campplus(tmp_path / "campplus.onnx"))
    voice.save_pretrained(tmp_path / "cosyvoice")
    prepare_clips(tmp_path / "corpus", vocoder="none", train=4, dev=2)
    for split in ("test-clean", "test-other"):
        some = [u for u in load_bundled_clips() if u.split == split]
        write_manifest(tmp_path / "corpus" / f"{split}.jsonl", some)
    small = {"model.dim": 32, "model.embedding_dim": 16, "model.ffn_dim": 48, "model.encoder_layers": 1}
    small |= {"model.decoder_layers": 1, "model.heads": 2, "batch_seconds": 10.0, "batches_per_update": 1}
    small |= {"warmup_steps": 1, "validate_every": 2, "save_every": 2}
    names = dict(asr="canary", tokenizer="cosyvoice", codec="cosyvoice", data="corpus")
    here = {name: str(tmp_path / folder) for name, folder in names.items()}
    here |= dict(clips={"test-clean": 2, "test-other": 2}, steps=dict(ddm=[2, 2], ar=[2, 2]))
    scale = replace(PLAN.scale("paper"), overrides=small, **here)
    results = Results(tmp_path / "results")
    judges = Judges(dict(wer=Judge("the")), Judge(3.0), Judge([1.0, 0.0]))
    jobs = plan_jobs(PLAN, scale, [PLAN.cell(name) for name in ("ddm-4l-fsq", "s3-oracle")])
    assert [job.run for job in jobs if job.kind == "train"] == ["ddm-no-vq", "ddm-4l-fsq"]
    run_jobs(jobs, PLAN, scale, tmp_path / "runs", results, judges, tmp_path / "judged", device="cpu")
    assert (tmp_path / "runs/ddm-no-vq-s0/model/recogniser").is_dir(), "the first stage trains the encoder"
    row = row_of(PLAN, scale, results, "table2", "ddm-4l-fsq", "test-other")
    assert row["seeds"] == 1 and row["distillmos"] == 3.0 and row["WER % (reported)"] == 8.62
    assert scale.columns["distillmos"] == "UT-MOS" and row["bitrate"] > 0

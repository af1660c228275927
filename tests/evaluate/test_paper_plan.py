"The registered plan, from a run to a printed number: at the size `tiny`, with the code of every other size"

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffuspeech.cli import main
from diffuspeech.diffusion.catalogue import get_rule
from diffuspeech.evaluate.paper import COLUMNS, Measured, judge_finding, reported_numbers, table_rows
from diffuspeech.evaluate.paper_jobs import Results, missing_jobs, run_jobs, train_run
from diffuspeech.evaluate.paper_plan import MAX_MINUTES, plan_jobs, read_plan, repository_folder, train_config

FILE = repository_folder() / "plan.json"
PLAN = read_plan(FILE)
CELLS = ["ddm-no-vq", "ddm-4l-fsq", "steps-1", "rule-ancestral", "length-0.7"]  # one of each table and figure


def test_every_run_and_cell_of_the_plan_can_be_made():
    "Its presets, rules, columns and rows of the paper exist at every scale"
    for name, scale in PLAN.scales.items():
        for run in PLAN.runs:
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
        rows = results.clips(results.rows[0] | dict(cell="ddm-no-vq", seed=0) | find(results, "ddm-no-vq"))
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

"Trainings, sweeps and corpus work as jobs: submitit's local executor, torchrun, and the script for Slurm"

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from browser import REPO
from small import prepare_clips

from diffuspeech.data.manifest import Manifest, write_manifest
from diffuspeech.evaluate.clips import load_bundled_clips
from diffuspeech.evaluate.speech import judge_all
from diffuspeech.train.journal import history
from diffuspeech.voice.jobs import collect_utterances, encode_all, load_codec
from diffuspeech.voice.prepared import prepare_corpus
from diffuspeech.workbench import array
from diffuspeech.workbench.cluster import submit_sweep, submit_training
from diffuspeech.workbench.job import Job, found_processes, start, training_command
from diffuspeech.workbench.monitor import Monitor
from diffuspeech.workbench.sweep import grid, sweep_rows

LINE = "lr=0.02 warmup_steps=5 validate_every=20 save_every=20 precision=fp32 ema_decay=0.5".split()
STAND_IN = "#!/bin/sh\necho Submitted batch job 7\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with the small task, from which a run reads its modules"
    shutil.copy(REPO / "tests" / "support" / "line_task.py", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def wait_for_step(folder: Path, step: int):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (folder / "log.jsonl").exists() and max(history(folder)["train"].get("step", [0])) >= step:
            return
        time.sleep(0.2)
    raise AssertionError((folder / "output.log").read_text()[-2000:])


def test_a_job_whose_time_is_up_is_queued_again(place):
    "It saves, goes on from there in a second job, and has each step once"
    pytest.importorskip("submitit")
    options = [*LINE, "steps=100"]
    job = submit_training("line_task:LineTask", place / "run", options, "local", gpus=0, cwd=place)
    wait_for_step(place / "run", 10)
    (task,) = psutil.Process(job._process.pid).children()
    task.send_signal(signal.SIGUSR2)  # as Slurm warns
    assert job.result() == "finished"
    assert history(place / "run")["train"]["step"] == list(range(1, 101))
    output = (place / "run" / "output.log").read_text()
    assert output.count("$ ") == 2 and "stopped" in output, output
    assert Job(place / "run").status == "finished"


def test_a_job_that_fails_names_the_last_line(place):
    submitit = pytest.importorskip("submitit")
    options = [*LINE, "steps=5", "model.width=3"]
    job = submit_training("line_task:LineTask", place / "run", options, "local", gpus=0, cwd=place)
    with pytest.raises(submitit.core.utils.FailedJobError, match="RuntimeError"):
        job.result()
    assert Job(place / "run").status == "died"


@pytest.fixture
def slurm(place, monkeypatch):
    "Stand-ins for Slurm's commands; squeue answers what is written into a file"
    pytest.importorskip("submitit")
    texts = dict(sbatch=STAND_IN, srun=STAND_IN, squeue=f"#!/bin/sh\ncat {place}/state\n")
    texts["scancel"] = f"#!/bin/sh\necho $1 > {place}/cancelled\n"
    for name, text in texts.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def test_a_sweep_is_one_array_of_slurm(slurm):
    variants = grid({"lr": [0.002, 0.1], "warmup_steps": [1, 5]})
    options = dict(timeout_min=30, slurm_array_parallelism=2, slurm_partition="gpu", cwd=slurm)
    jobs = submit_sweep("line_task:LineTask", slurm / "sweep", variants, ["steps=40"], gpus=2, **options)
    (script,) = (slurm / "sweep" / "jobs").glob("*submission.sh")
    text = script.read_text()
    for line in ("--array=0-3%2", "--gpus-per-node=2", "--time=30", "--partition=gpu", "--signal=USR2@90"):
        assert f"#SBATCH {line}\n" in text, text
    assert [job.job_id for job in jobs] == ["7_0", "7_1", "7_2", "7_3"]
    run = Job(slurm / "sweep" / "lr=0.002,warmup_steps=1")
    assert "--nproc-per-node 2" in " ".join(run.record["command"])
    for state, status in (("PENDING", "queued"), ("RUNNING", "starting"), ("", "died")):
        (slurm / "state").write_text(state)
        assert run.status == status
    (slurm / "state").write_text("RUNNING")
    run.stop()
    assert (run.folder / "stop").exists() and not (slurm / "cancelled").exists(), "the job looks for it"
    (slurm / "state").write_text("PENDING")
    run.stop()
    assert (slurm / "cancelled").read_text().split() == ["7_0"]
    (slurm / "state").write_text("")
    assert run.status == "stopped"
    assert [row["run"] for row in sweep_rows(slurm / "sweep")][0] == run.folder.name


def test_a_sweep_as_local_tasks(place):
    pytest.importorskip("submitit")
    variants = grid({"lr": [0.002, 0.1]})
    common = [*LINE[1:], "steps=20"]
    options = dict(cluster="local", gpus=0, cwd=place)
    jobs = submit_sweep("line_task:LineTask", place / "sweep", variants, common, **options)
    assert [job.result() for job in jobs] == ["finished"] * 2
    slow, fast = sweep_rows(place / "sweep")
    assert fast["score"] < slow["score"] and slow["run"] == "lr=0.002"


def test_torchrun_for_the_gpus_that_are_found(place, monkeypatch):
    "Two processes on this machine's processors take the steps of one"
    assert found_processes() == 1 and "torch.distributed.run" not in training_command("ddm", place)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert found_processes() == 4 and found_processes("cpu") == 1
    losses = []
    for processes in (1, 2):
        options = [*LINE, "steps=10", "batches_per_update=2"]
        folder = place / f"run{processes}"
        job = start("line_task:LineTask", folder, options, "cpu", processes, place)
        assert job.wait(240) == "finished", (folder / "output.log").read_text()[-2000:]
        losses.append(history(folder)["train"]["loss"])
    assert len(losses[0]) == 10 and losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    "Twelve clips, and one that is not there"
    folder = tmp_path_factory.mktemp("manifest")
    prepare_clips(folder, train=12, vocoder="none")
    path = folder / "train.jsonl"
    path.write_text(path.read_text() + '{"audio_filepath": "gone.wav", "duration": 1.0, "text": "gone"}\n')
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def run_as_tasks(task: array.CorpusTask) -> tuple[int, list[str]]:
    "Three tasks of this machine, and what they come to"
    jobs = array.submit(task, 3, "local")
    for job in jobs:
        job.result()
    return array.merge(task, 3)


def test_three_tasks_prepare_what_one_process_does(manifest, tmp_path):
    pytest.importorskip("submitit")
    one = prepare_corpus(manifest, tmp_path / "one", vocoder="mel", rows=4, workers=1)
    task = array.Prepare(str(manifest), str(tmp_path / "three"), vocoder="mel", rows=4)
    count, errors = run_as_tasks(task)
    assert files_of(one) == files_of(tmp_path / "three") and len(files_of(one)) >= 9
    assert count > 12 and len(errors) == 1 and "gone.wav" in errors[0]


def test_three_tasks_encode_what_one_process_does(manifest, tmp_path):
    "And a task that is finished is not done again"
    pytest.importorskip("submitit")
    alone = collect_utterances([manifest])
    encode_all(alone, load_codec(), tmp_path / "one.jsonl")
    task = array.Encode((str(manifest),), str(tmp_path / "three.jsonl"))
    array.Part(task, 1, 3)()
    finished = task.folder / "00001-of-00003.jsonl"
    before = finished.stat().st_mtime_ns
    jobs = array.submit(task, 3, "local")
    for job in jobs:
        job.result()
    assert finished.stat().st_mtime_ns == before
    count, errors = array.merge(task, 3)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "three.jsonl").read_bytes()
    assert count == 12 and errors == alone.errors and not task.folder.exists()


@pytest.mark.needs("whisper")
def test_three_parts_are_judged_as_one(tmp_path, judge_or_skip):
    from diffuspeech.cli.output import write_rows

    write_manifest(tmp_path / "test.jsonl", load_bundled_clips()[:4])
    assert len(Manifest(tmp_path / "test.jsonl")) == 4
    job = collect_utterances([tmp_path / "test.jsonl"])
    rows, total = judge_or_skip(judge_all, job)
    write_rows([*rows, total], tmp_path / "one.json")
    task = array.Judge((str(tmp_path / "test.jsonl"),), str(tmp_path / "three.json"))
    for part in range(3):
        array.Part(task, part, 3)()
    assert array.merge(task, 3) == (4, job.errors)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "three.json").read_bytes()


def test_the_launch_notebook_runs_without_a_person(place):
    "With papermill's parameters it trains; without any it starts nothing"
    pytest.importorskip("papermill")
    notebook = REPO / "nbs" / "launch" / "train.ipynb"
    changes = " ".join([*LINE, "steps=20"])
    values = dict(preset="line_task:LineTask", folder=str(place / "run"), changes=changes, device="cpu")
    words = [word for name, value in values.items() for word in ("-p", name, value)]
    command = [sys.executable, "-m", "papermill", notebook, place / "done.ipynb", *words]
    env = os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Job(place / "run").status == "finished" and "finished" in (place / "done.ipynb").read_text()


def test_the_monitor_gives_a_run_to_slurm(slurm, monkeypatch):
    monitor = Monitor(slurm / "runs")
    told = []
    monkeypatch.setattr(monitor, "send", lambda message, buffers=None: told.append(message))
    assert monitor.slurm
    options = ["timeout_min=90", "slurm_partition=gpu"]
    form = dict(preset="line_task:LineTask", folder="runs/line", overrides=["steps=5"], device="auto")
    monitor._answer(monitor, dict(type="start", processes=2, slurm=options, **form), [])
    assert told[-1]["text"] == "", told
    (script,) = (slurm / "runs/line/jobs").glob("*submission.sh")
    assert "--gpus-per-node=2\n" in script.read_text() and "--time=90\n" in script.read_text()
    (slurm / "state").write_text("PENDING")
    monitor.look()
    assert monitor.data["status"] == "queued"
    monitor._answer(monitor, dict(type="start", processes=1, slurm=["x"], **form), [])
    assert "should be key=value" in told[-1]["text"]

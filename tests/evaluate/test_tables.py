"Tables from a shell: real judges and the built-in models on a few clips, and an external system's waves"

import json

import pytest

from diffuspeech.cli import main
from diffuspeech.data import audio
from diffuspeech.data.manifest import load_audio
from diffuspeech.evaluate import clips, reconstruct, speed, systems
from diffuspeech.evaluate.clip_rows import read_clip_rows


@pytest.fixture
def short_clips(monkeypatch):
    "The two shortest clips of each split in the place of the whole pack"
    bundled, some = sorted(clips.load_bundled_clips(), key=lambda u: u.duration), []
    for split in ("test-clean", "test-other"):
        some += [u for u in bundled if u.split == split][:2]
    monkeypatch.setattr(clips, "load_bundled_clips", lambda: some)
    return some


def test_reconstruct_and_external(short_clips, tmp_path, monkeypatch, capsys):
    command = [
        "evaluate",
        "reconstruct",
        "--bundled",
        "--mos-clips",
        "2",
        "--json",
        str(tmp_path / "ours.json"),
        "--protocol",
        str(tmp_path / "protocol.json"),
        "--cache-dir",
        str(tmp_path / "kept"),
    ]
    assert main(command) == 0
    rows = json.loads((tmp_path / "ours.json").read_text())
    with monkeypatch.context() as m:
        listed = reconstruct.default_systems
        m.setattr(reconstruct, "default_systems", lambda *models: listed(*models)[::-1])
        for kind in (systems.CodecOracle, systems.Decoder):
            m.setattr(kind, "render", lambda *args, **options: 1 / 0)
        assert main(command) == 0
    again = json.loads((tmp_path / "ours.json").read_text())
    key = lambda row: json.dumps([row["split"], row["system"], row["steps"], row["length_mode"]])
    assert sorted(again, key=key) == sorted(rows, key=key), "nothing is rendered again, in another order"
    ways = {(r["system"], r["steps"], r["length_mode"]) for r in rows}
    name = "DDM-4L-FSQ"
    assert {
        ("Original", None, None),
        ("S3-Oracle", None, None),
        ("AR-4L-FSQ", None, "eos"),
        ("AR-4L-FSQ", None, "given"),
        *((name, n, "given") for n in (1, 10, 50)),
        *((name, 10, mode) for mode in ("ratio", "predicted", "eos")),
        (f"{name}, transcript", 10, "predicted"),
        ("AR-4L-FSQ, transcript", None, "eos"),
        *(
            (f"{whose}, {control}", n, "given")
            for whose, n in ((name, 10), ("AR-4L-FSQ", None))
            for control in ("text only", "shuffled")
        ),
    } == ways and len(rows) == 2 * len(ways)
    for r in rows:
        assert 0 <= r["wer_low"] <= r["wer"] <= r["wer_high"] and 1 <= r["distillmos"] <= 5
        assert r["steps"] not in (1, 10) or r["length_mode"] != "given" or r["nfe"] == r["steps"]
        assert (r["bitrate"] is None) == (r["system"] == "Original" or "text only" in r["system"]) and (
            r["wer_over_ar"] is None
        ) == (
            r["system"] in ("Original", "S3-Oracle")
            or r["system"] == "AR-4L-FSQ"
            and r["length_mode"] == "eos"
        )
        kinds = {clips.voice_kind(u) for u in short_clips if u.split == r["split"]}
        assert {kind for kind in clips.VOICE_KINDS if r[f"wer_{kind}"] is not None} == kinds and (
            len(kinds) > 1 or r[f"wer_{next(iter(kinds))}"] == r["wer"]
        )
        headline = ("Original", None), ("S3-Oracle", None), (name, "predicted"), ("AR-4L-FSQ", "eos")
        assert r["headline"] == ((r["system"], r["length_mode"]) in headline)
    header, found = read_clip_rows(tmp_path / "ours.clips.jsonl.gz")
    assert len(found) == len(ways) and {len(some) for some in found.values()} == {len(short_clips)}
    assert header["judges"] == json.loads((tmp_path / "protocol.json").read_text())["judges"]
    assert {"transcript", "errors", "retry"} <= set(found[f"{name}, 10 steps, length predicted"][0])
    original = {r["split"]: r for r in rows if r["system"] == "Original"}
    assert all(r["spksim"] > 0.99 for r in original.values())
    for u in short_clips:
        audio.save(tmp_path / "theirs" / f"{u.id}.wav", load_audio(u))
    theirs = [
        "evaluate",
        "external",
        "--bundled",
        "--mos-clips",
        "2",
        "--waves",
        str(tmp_path / "theirs"),
        "--protocol",
        str(tmp_path / "protocol.json"),
    ]
    assert main([*theirs, "--length", "given", "--json", str(tmp_path / "theirs.json")]) == 0
    found = [
        r
        for r in json.loads((tmp_path / "theirs.json").read_text())
        if r["system"] == str(tmp_path / "theirs")
    ]
    assert len(found) == 2 and all(
        r["length_mode"] == "given" and r["wer"] == original[r["split"]]["wer"] for r in found
    ), "the recordings themselves are judged as the recordings"
    capsys.readouterr()
    assert main(theirs) == 1 and "needs --length, too" in capsys.readouterr().err
    (tmp_path / "theirs" / f"{short_clips[0].id}.wav").unlink()
    assert main([*theirs, "--length", "given"]) == 1
    assert f"no wave for 1 of 4 clips, {short_clips[0].id} among them" in capsys.readouterr().err
    held = json.loads((tmp_path / "protocol.json").read_text())
    (tmp_path / "protocol.json").write_text(json.dumps(held | dict(lengths=["eos"])))
    assert main([*theirs, "--length", "given"]) == 1
    assert "another protocol: length is given, not eos" in capsys.readouterr().err


def test_the_cost_of_decoders(monkeypatch, tmp_path):
    "The command's own columns, on sizes that a test can wait for"
    small = dict(seconds=(1.0,), steps=(2,), variants=("fp32",), repeats=1)
    monkeypatch.setattr(
        speed,
        "decoder_table",
        lambda real=speed.decoder_table, **how: real(
            **how | small | dict(batches=(1, 2)[: 2 - ("frame_rate" in how)])
        ),
    )
    tiny = dict(dim=32, embedding_dim=16, ffn_dim=48)
    monkeypatch.setattr(speed, "SIZES", (tiny, tiny, tiny | dict(frame_rate=50.0)))
    assert main(["bench", "decoder", "--json", str(tmp_path / "cost.json")]) == 0
    rows = json.loads((tmp_path / "cost.json").read_text())
    assert [(r["tokens"], r["batch"]) for r in rows] == [
        (25, 1),
        (25, 2),
        (25, 1),
        (25, 2),
        (50, 1),
    ] and rows[0]["million"] > rows[2]["million"] == rows[-1]["million"]
    for r in rows:
        assert r["decoder_ms"] > 0 and r["ratio_ar"] == pytest.approx(r["ar_ms"] / r["decoder_ms"], rel=0.1)
        assert (r["total_ms"] is None) == (r["tokens"] == 50) and (
            r["total_ms"] is None or r["total_ms"] > r["decoder_ms"]
        )


def test_the_cost_of_training_and_a_plan(short_clips, tmp_path):
    assert main(["bench", "training", "--json", str(tmp_path / "cost.json")]) == 0
    assert [r["loop"] for r in json.loads((tmp_path / "cost.json").read_text())] == [
        "bucketed",
        "bucketed, output at all positions",
        "plain",
    ]
    assert main(["plan", "paper-vectors", "--gpus", "32", "--json", str(tmp_path / "plan.json")]) == 0
    (row,) = json.loads((tmp_path / "plan.json").read_text())
    assert row["gpus"] == 32 and abs(row["trained"] / 316e6 - 1) < 0.05 and row["fits"]

"""From a shell: recordings reconstructed, sentences synthesized, and what is refused

Small networks with random weights, and the built-in codec."""

import json
from pathlib import Path

import pytest
import torch

from diffuspeech.asr.canary import Canary, CanaryConfig
from diffuspeech.cli import main
from diffuspeech.data import audio
from diffuspeech.data.manifest import Utterance, write_manifest
from diffuspeech.diffusion import trajectory
from diffuspeech.evaluate.reconstruct import default_systems
from diffuspeech.evaluate.systems import Decoder
from diffuspeech.models.decoder import DecoderConfig, SpeechDecoder
from diffuspeech.models.reconstructor import Reconstructor
from diffuspeech.tokenizers.s3 import load_builtin_tokenizer
from diffuspeech.tokenizers.taste import Taste
from diffuspeech.workbench.branch import branch
from diffuspeech.workbench.player import player

CLIP = audio.load_clip()[:32_000]
TEXT = "please leave your message"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "ddm and ar, as a run with a trained encoder exports them"
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    recogniser = Canary(
        CanaryConfig(
            hidden=32,
            layers=1,
            heads=2,
            ffn_dim=32,
            channels=4,
            n_mels=40,
            decoder_hidden=32,
            decoder_layers=1,
            decoder_heads=2,
            decoder_ffn_dim=32,
        )
    )
    metadata = dict(tokenizer=load_builtin_tokenizer().version, recogniser="its own", tokens_per_piece=6.0)
    for name in ("ddm", "ar"):
        recogniser.save_pretrained(home / name / "recogniser")
        Taste.from_recogniser(recogniser, quantizer=dict(kind="fsq", layers=4)).save_pretrained(
            home / name / "taste", **metadata
        )
        decoder = SpeechDecoder(
            DecoderConfig(
                causal=name == "ar", text_vocab_size=258, vector_dim=32, dim=32, embedding_dim=16, ffn_dim=48
            )
        )
        with torch.no_grad():
            decoder.bias[decoder.config.eos_token_id] = 2.0
        decoder.save_pretrained(home / name / "decoder", **metadata)
    return home


@pytest.fixture
def wav(tmp_path):
    audio.save(tmp_path / "in.wav", CLIP)
    return tmp_path / "in.wav"


def run(capsys, *words):
    "Exit status, and what was printed"
    status, output = main(list(map(str, words))), capsys.readouterr()
    return status, output.out + output.err


EOS = dict(eos="suppress", eos_id=4096)


def test_a_run_goes_on_by_hand(models):
    "From its canvas at a step, with the condition of its own row; what stands there stays"
    model = Reconstructor.from_pretrained(models / "ddm")
    both = model.reconstruct([CLIP, CLIP[:16_000]], [TEXT, "leave"], steps=4, candidates=4)
    alone = model.reconstruct(CLIP[:16_000], "leave", steps=4)
    view = player(both, row=1).views[0]
    blank = torch.full((view.length,), view.trajectory.mask_id)
    again = view.resume(blank, steps=4, candidates=0)
    assert again.tokens.tolist() == alone.generation.tokens.tolist(), "the run of this row"
    changed = branch(view, 2, {3: 7}, rule="random", steps=2, seed=5)
    t = changed.trajectory
    assert t.final[0, 3] == 7 and (t.final != t.mask_id).all() and t.steps == 4
    kept = (view.canvas(2) != t.mask_id) & (torch.arange(view.length) != 3)
    assert kept.any() and torch.equal(t.final[0][kept], view.canvas(4)[kept])
    assert len(changed.sound(4)) == len(both.waves[1]) and (changed.text, view.text) == ("leave", "leave")
    with pytest.raises(ValueError, match="place 99 is outside"):
        branch(view, 2, {99: 7})


def test_play_opens_a_saved_run(models, wav, tmp_path, capsys, monkeypatch):
    "The codec, the voice and the text of a run are known from its trace"
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    common = ("reconstruct", wav, "--text", TEXT, "--model", models / "ddm", "-o", tmp_path / "a.wav")
    for steps in (2, 3):
        target = tmp_path / f"trace{steps}"
        assert run(capsys, *common, "--steps", steps, "--trajectory", target, "--overwrite")[0] == 0
    trace = tmp_path / "trace2" / "in.safetensors"
    status, told = run(capsys, "play", trace, "-o", tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert status == 0 and opened == [(tmp_path / "run.html").as_uri()] and TEXT in page
    assert all(f'"0/silent/{step}":' in page for step in range(3)) and '"0/silent/3"' not in page
    other = tmp_path / "trace3" / "in.safetensors"
    both = ("play", trace, other, "-o", tmp_path / "two.html", "--no-browser")
    assert run(capsys, *both)[0] == 0 and len(opened) == 1
    assert '"1/silent/3":' in (tmp_path / "two.html").read_text()
    wav.unlink()
    status, told = run(capsys, "play", trace, "-o", tmp_path / "x.html", "--no-browser")
    assert status == 1 and "--reference" in told and not (tmp_path / "x.html").exists()
    assert run(capsys, "play", trace, "-o", tmp_path / "x.html", "--reference", tmp_path / "a.wav")[0] == 0
    status, told = run(capsys, "play", tmp_path / "gone.safetensors", "-o", tmp_path / "y.html")
    assert status == 1 and "no such file" in told


def test_reconstructs_a_recording(models, wav, tmp_path, capsys):
    common = (
        "reconstruct",
        wav,
        "--text",
        TEXT,
        "--model",
        models / "ddm",
        "--quantizer",
        "fsq4",
        "--steps",
        4,
        "--sampler",
        "conf-topk",
    )
    assert run(capsys, *common, "-o", tmp_path / "a.wav", "--trajectory", tmp_path / "trace")[0] == 0
    assert run(capsys, *common, "-o", tmp_path / "b.wav")[0] == 0
    a, b = audio.load(tmp_path / "a.wav"), audio.load(tmp_path / "b.wav")
    assert torch.equal(a, b) and len(a) == len(CLIP), "the given length, and the same seed"
    seen = trajectory.load(tmp_path / "trace" / "in.safetensors")
    assert (
        seen.steps == 4
        and seen.rule == "conf_topk"
        and (seen.commit_step[0] >= 0).all()
        and int(seen.lengths[0]) == len(CLIP) // 640
    )
    reference = seen.about.pop("reference")
    assert Path(reference.pop("audio_filepath")) == wav.resolve() and reference == dict(
        offset=0, duration=2.0
    )
    known = dict(texts=[TEXT], model=str(models / "ddm"), codec="small", frame_rate=25.0, sampling=EOS)
    known |= dict(scale=1.0, seed=0)
    assert seen.about == known, "what a saved run knows of itself"
    model = Reconstructor.from_pretrained(models / "ddm")
    shown = player(seen, model, text=TEXT)
    shown.save(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert all(f'"0/silent/{step}":' in page for step in range(5)), "each step has its sound"
    full, half, none = (model.run_codec(seen.canvas(n)[0], CLIP) for n in (4, 2, 0))
    assert (
        len(full) == len(half) == len(none) == len(CLIP)
        and not none.any()
        and torch.allclose(full, a, atol=1e-3)
    ), "the last one is what was said"
    masked = (seen.canvas(2)[0] == seen.mask_id).repeat_interleave(640)
    assert 0 < masked.sum() < len(CLIP) and not half[masked].any() and half[~masked].any()
    assert (
        run(capsys, "reconstruct", wav, "--text", TEXT, "--model", models / "ar", "-o", tmp_path / "c.wav")[0]
        == 0
        and (tmp_path / "c.wav").exists()
    )
    assert run(
        capsys,
        "reconstruct",
        wav,
        "--model",
        models / "ddm",
        "--text",
        TEXT,
        "--length",
        "ratio",
        "-o",
        tmp_path / "d.flac",
    )[0] == 0 and len(audio.load(tmp_path / "d.flac")) != len(CLIP)


@pytest.mark.parametrize("name", ["ddm", "ar"])
def test_a_long_recording_is_decoded_in_spans(models, tmp_path, capsys, name):
    "Of three recordings the second is too long, which changes nothing for the others; each has a trajectory"
    whole, cut = Reconstructor.from_pretrained(models / name), Reconstructor.from_pretrained(models / name)
    assert whole.max_span is None
    cut.max_span = 60
    waves, texts, seeds = (
        [CLIP, torch.cat([CLIP] * 3), CLIP],
        [TEXT, f"{TEXT} behind the tone and then " * 2 + TEXT, TEXT],
        torch.tensor([3, 4, 5]),
    )
    kwargs = dict(length="given", seed=seeds) | (dict(steps=3) if name == "ddm" else {})
    before, after = whole.reconstruct(waves, texts, **kwargs), cut.reconstruct(waves, texts, **kwargs)
    assert (
        after.lengths.tolist() == before.lengths.tolist() == [50, 150, 50]
        and after.tokens.shape == (3, 150)
        and ((after.tokens >= 0).sum(1) == after.lengths).all()
    )
    assert [len(wave) for wave in after.waves] == [640 * n for n in (50, 150, 50)]
    assert torch.equal(after.tokens[[0, 2]], before.tokens[[0, 2]]) and not torch.equal(
        after.tokens[1], before.tokens[1]
    )
    assert torch.equal(after.tokens, cut.reconstruct(waves, texts, **kwargs).tokens)
    assert after.codes.shape == before.codes.shape
    drawn = kwargs | dict(seed=0, temperature=1.0)
    assert torch.equal(
        cut.reconstruct(waves, texts, **drawn).tokens[[0, 2]],
        whole.reconstruct(waves, texts, **drawn).tokens[[0, 2]],
    ), "one seed for all: the others still do not notice"
    if name == "ar":
        assert (
            after.generation.calls.tolist() == [50, after.generation.nfe, 50]
            and after.generation.nfe < 75
            and not after.generation.ended.any()
        )
        free = cut.reconstruct(waves, texts, seed=seeds)
        assert free.generation.ended.shape == free.lengths.shape == (3,)
        return
    assert (
        after.generation.nfe == 3
        and after.generation.calls.tolist() == [3, 3, 3]
        and after.generation.tokens_per_call == pytest.approx(250 / 9)
    )
    kept = after.generation.trajectory
    assert (
        torch.equal(kept.final[1, :150], after.tokens[1])
        and kept.lengths.tolist() == [50, 150, 50]
        and (kept.commit_step[1, :150] >= 0).all()
    )
    ends = cut.reconstruct(waves, texts, length="eos", steps=3, seed=seeds)
    assert not after.ended.any() and torch.equal(
        ends.ended[[0, 2]], (ends.lengths < ends.generation.lengths)[[0, 2]]
    )
    assert ends.lengths[1] <= ends.generation.lengths[1] and ((ends.tokens >= 0).sum(1) == ends.lengths).all()
    for rule in ("remdm_cap", "blocks(conf_topk)"):
        again = cut.reconstruct(waves, texts, rule=rule, **kwargs).generation.trajectory
        assert torch.equal(again.canvas(again.steps)[1, :150], again.final[1, :150])
    config = models / name / "decoder" / "config.json"
    plain = config.read_text()
    try:
        config.write_text(
            json.dumps((said := json.loads(plain)) | dict(metadata=said["metadata"] | dict(max_span=60)))
        )
        audio.save(tmp_path / "long.wav", waves[1])
        status, output = run(
            capsys,
            "reconstruct",
            tmp_path / "long.wav",
            "-o",
            tmp_path / "out.wav",
            "--text",
            texts[1],
            "--model",
            models / name,
            "--steps",
            3,
            "--trajectory",
            tmp_path / "trace",
        )
        assert status == 0, output
        assert trajectory.load(next((tmp_path / "trace").glob("*.safetensors"))).lengths.tolist() == [150]
    finally:
        config.write_text(plain)


def test_a_missing_text_is_transcribed(wav, tmp_path, capsys):
    "The built-in recogniser, or another one, gives the transcript"
    status, output = run(capsys, "reconstruct", wav, "-o", tmp_path / "a.wav", "--steps", 2)
    text = output.split("in: transcript: ")[1].splitlines()[0]
    assert status == 0 and len(text.split()) >= 3 and len(audio.load(tmp_path / "a.wav")) == len(CLIP)
    model = Reconstructor.from_pretrained()
    spoken = model.reconstruct(CLIP, steps=2)
    assert spoken.texts == model.transcribe([CLIP]) == [text] and torch.allclose(
        spoken.waves[0], audio.load(tmp_path / "a.wav"), atol=1e-4
    )


def test_a_recording_is_not_written_over(models, wav, tmp_path, capsys):
    before = wav.read_bytes()
    for out, message in ((wav, "is an input"), (tmp_path, "in.wav: is the recording itself")):
        status, output = run(
            capsys, "reconstruct", wav, "--text", TEXT, "-o", out, "--model", models / "ddm", "--steps", 2
        )
        assert status == 1 and message in output and wav.read_bytes() == before
    for words in (("reconstruct", wav, "--text", TEXT), ("synthesize", TEXT)):
        status, output = run(
            capsys, *words, "-o", tmp_path / "out.txt", "--model", models / "ddm", "--steps", 10**4
        )
        assert status == 1 and "out.txt: the extension gives the format" in output, (
            "said before anything is decoded"
        )
    (tmp_path / "v1.2").mkdir()
    assert (
        run(
            capsys,
            "reconstruct",
            wav,
            "--text",
            TEXT,
            "-o",
            tmp_path / "v1.2",
            "--model",
            models / "ddm",
            "--steps",
            2,
        )[0]
        == 0
        and (tmp_path / "v1.2" / "in.wav").exists()
    )


def test_a_job_goes_on(models, wav, tmp_path, capsys):
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    write_manifest(
        tmp_path / "two.jsonl",
        [
            Utterance(wav, 2.0, text=TEXT, id="one"),
            Utterance(wav, 2.0, text="...", id="two"),
            Utterance(wav, 2.0, text=TEXT, id="../three"),
        ],
    )
    status, output = run(
        capsys,
        "reconstruct",
        tmp_path / "two.jsonl",
        tmp_path / "bad.wav",
        tmp_path / "none.wav",
        "-o",
        tmp_path / "out",
        "--model",
        models / "ddm",
        "--steps",
        2,
    )
    assert (
        status == 1
        and "bad.wav: not an audio file" in output
        and "none.wav: no such file" in output
        and (tmp_path / "out/one.wav").exists()
    )
    assert (
        "1 reconstructed" in output
        and "4 skipped" in output
        and "holds no word" in output
        and "'../three.wav' leads out of" in output
    )
    assert [f.name for f in (tmp_path / "out").rglob("*")] == ["one.wav"] and not list(
        tmp_path.glob("three*")
    )
    words = ("reconstruct", tmp_path / "two.jsonl", "-o", tmp_path / "out", "--model", models / "ddm")
    made = (tmp_path / "out/one.wav").stat().st_mtime_ns
    status, output = run(capsys, *words, "--steps", 2)
    assert "1 reconstructed" in output and (tmp_path / "out/one.wav").stat().st_mtime_ns == made
    run(capsys, *words, "--steps", 3)
    assert (tmp_path / "out/one.wav").stat().st_mtime_ns > made, "another number of steps is another job"


def test_seeds_differ_and_an_immediate_end_is_reported(models, wav, tmp_path, capsys):
    common = ("reconstruct", wav, "--text", TEXT, "--model", models / "ar")
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        status, output = run(capsys, *common, "--seed", seed, "-o", tmp_path / f"{name}.wav")
        assert status == 0, output
    a, b, c = (audio.load(tmp_path / f"{name}.wav") for name in "abc")
    assert torch.equal(a, b) and not (len(a) == len(c) and torch.equal(a, c))
    decoder = SpeechDecoder.from_pretrained(models / "ar" / "decoder")
    with torch.no_grad():
        decoder.bias[decoder.config.eos_token_id] = 100.0
    import shutil

    copy = Path(shutil.copytree(models / "ar", tmp_path / "mute"))
    decoder.save_pretrained(
        copy / "decoder", tokenizer=load_builtin_tokenizer().version, recogniser="its own"
    )
    status, output = run(capsys, *common[:-1], copy, "-o", tmp_path / "d.wav")
    assert (
        status == 1 and "no speech: the decoder ended at once" in output and not (tmp_path / "d.wav").exists()
    )


def test_synthesizes_a_sentence(models, wav, tmp_path, capsys):
    status, output = run(
        capsys,
        "synthesize",
        TEXT,
        "-o",
        tmp_path / "x.wav",
        "--model",
        models / "ddm",
        "--length",
        "ratio",
        "--steps",
        3,
        "--reference",
        wav,
        "--trajectory",
        tmp_path / "trace",
    )
    assert status == 0 and "3 calls" in output and len(audio.load(tmp_path / "x.wav")) > 8000
    assert trajectory.load(tmp_path / "trace" / "x.safetensors").steps == 3


def test_python_refuses_what_a_decoder_cannot_do(models):
    ar, ddm = (Reconstructor.from_pretrained(models / name) for name in ("ar", "ddm"))
    for kwargs in (dict(rule="random"), dict(cfg_scale=1.0), dict(steps=3), dict(scale=1.5)):
        with pytest.raises(ValueError, match=f"{next(iter(kwargs))}: only for diffusion decoders"):
            ar.reconstruct(CLIP, TEXT, **kwargs)
    with pytest.raises(ValueError, match="cfg_scale: .* a text alone has none"):
        ddm.synthesize(TEXT, length="ratio", cfg_scale=1.0)
    assert ddm.reconstruct(CLIP, TEXT, length="ratio", steps=2, eos="last").generation.nfe == 2
    assert (
        ddm.reconstruct(CLIP, TEXT, length="ratio").generation.nfe
        == 10
        < ddm.reconstruct(CLIP, TEXT, length="ratio", rule="conf_topp").generation.nfe
    ), "as many as the rule takes"
    for length in ("given", "ratio"):
        assert (
            ar.reconstruct(CLIP, TEXT, length=length, scale=1.5).lengths.tolist()
            == ddm.reconstruct(CLIP, TEXT, length=length, scale=1.5, steps=1).lengths.tolist()
        ), "where the length is known, it is kept to"
    assert (
        not ar.reconstruct(CLIP, TEXT, length="given").generation.ended.any()
        and len(ar.reconstruct(CLIP, TEXT, max_tokens=3).tokens[0]) <= 3
    )
    few = default_systems(ddm, ar)
    ddm.duration = None
    assert {row.length for row in few} - {row.length for row in default_systems(ddm, ar)} == {
        "predicted"
    } and ("eos", False) not in {
        (row.length, row.model.decoder.config.causal)
        for row in default_systems(ddm, ar)
        if isinstance(row, Decoder)
    }
    rows = [row for row in few if isinstance(row, Decoder) and row.model is ar]
    assert [row.name for row in rows] == [
        "AR-4L-FSQ",
        "AR-4L-FSQ",
        "AR-4L-FSQ, text only",
        "AR-4L-FSQ, shuffled",
    ] and {row.length for row in rows} == {"eos", "given"}
    with pytest.raises(ValueError, match="a diffusion decoder is expected here"):
        default_systems(ar, ddm)


def test_a_codec_need_not_take_a_seed(models):
    ddm = Reconstructor.from_pretrained(models / "ddm")

    class Plain:
        def decode(self, ids, lengths=None, reference=None):
            return torch.zeros(len(ids), ids.shape[1] * 640)

    ddm.codec = Plain()
    assert len(ddm.reconstruct(CLIP, TEXT, steps=2).waves[0]) == len(CLIP)


@pytest.mark.parametrize(
    "words, answer",
    [
        (
            ("reconstruct", "WAV", "WAV", "-o", "x.wav", "--model", "DDM"),
            "names one file, and there are 2 inputs",
        ),
        (
            ("reconstruct", "WAV", "WAV", "-o", "folder", "--text", "a", "--model", "DDM"),
            "--text is the transcript of one recording",
        ),
        (
            ("reconstruct", "WAV", "-o", "x.wav", "--model", "DDM"),
            "this model cannot transcribe",
        ),
        (
            (
                "reconstruct",
                "WAV",
                "-o",
                "x.wav",
                "--text",
                TEXT,
                "--model",
                "AR",
                "--steps",
                "4",
                "--trajectory",
                "x.trace",
            ),
            "--steps, --trajectory: only for diffusion decoders",
        ),
        (
            ("synthesize", TEXT, "-o", "x.wav", "--model", "AR", "--sampler", "random"),
            "--sampler: only for diffusion decoders",
        ),
        (
            ("synthesize", TEXT, "-o", "x.wav", "--model", "DDM", "--duration-model", "nowhere"),
            "nowhere: no such folder",
        ),
        (
            ("reconstruct", "WAV", "-o", "x.wav", "--text", TEXT, "--model", "DDM", "--quantizer", "rvq4"),
            "quantizer=rvq4: this model has fsq4",
        ),
        (
            ("reconstruct", "WAV", "-o", "x.wav", "--text", TEXT, "--model", "DDM", "--sampler", "conf-topq"),
            "is not a rule of the catalogue; did you mean 'conf_topp'",
        ),
        (("reconstruct", "WAV", "-o", "x.wav", "--text", "!?", "--model", "DDM"), "no word"),
        (("reconstruct", "WAV", "-o", "x.wav", "--model", "nowhere"), "nowhere: no such folder"),
        (
            ("synthesize", TEXT, "-o", "x.txt", "--model", "DDM", "--length", "ratio"),
            "the extension gives the format",
        ),
        (("synthesize", "", "-o", "x.wav", "--model", "DDM", "--length", "ratio"), "no word"),
    ],
)
def test_refused_in_one_line(models, wav, tmp_path, monkeypatch, capsys, words, answer):
    monkeypatch.chdir(tmp_path)
    status, output = run(
        capsys, *({"WAV": wav, "DDM": models / "ddm", "AR": models / "ar"}.get(word, word) for word in words)
    )
    assert status != 0 and answer in output and not list(tmp_path.glob("x.*")), output


def corrupt_checkpoint(kind, folder):
    "A decoder's folder with something wrong"
    file = folder / "decoder" / "model.safetensors"
    config = json.loads((folder / "decoder" / "config.json").read_text())
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "pickle":
        file.rename(file.with_name("pytorch_model.bin"))
        (folder / "decoder" / "config.json").unlink()
    elif kind == "other token ids":
        config["metadata"]["tokenizer"] = "s3-small-ffffffff"
    elif kind == "another recogniser":
        config["metadata"]["recogniser"] = "ffffffff"
    elif kind == "another version":
        config["diffuspeech"] = 99
    elif kind == "another model":
        config["model"] = "Flow"
    if kind != "pickle":
        (folder / "decoder" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "kind, answer",
    [
        ("truncated", "truncated|not a safetensors|incomplete"),
        ("pickle", "is a pickle, which is never read"),
        ("other token ids", "trained with the tokenizer s3-small-ffffffff"),
        ("another recogniser", "trained with the recogniser ffffffff"),
        ("another version", "99"),
        ("another model", "holds a Flow"),
    ],
)
def test_checkpoints_that_are_refused(models, wav, tmp_path, capsys, kind, answer):
    import re
    import shutil

    folder = Path(shutil.copytree(models / "ddm", tmp_path / "copy"))
    corrupt_checkpoint(kind, folder)
    status, output = run(
        capsys, "reconstruct", wav, "-o", tmp_path / "x.wav", "--text", TEXT, "--model", folder
    )
    assert (
        status == 1
        and re.search(answer, output)
        and str(folder) in output
        and "Traceback" not in output
        and not (tmp_path / "x.wav").exists()
    ), output

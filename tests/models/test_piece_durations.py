"A decoder that is told when each piece is spoken: where its lengths come from, and what stays in an infill"

from dataclasses import replace

import pytest
import torch
from small import prepare_clips, save_random_models

from diffuspeech.data.audio import load_clip
from diffuspeech.models.autoregressive import generate
from diffuspeech.models.decoder import Condition, DecoderConfig, SpeechDecoder
from diffuspeech.models.piece_durations import carry_durations, fit_durations, piece_at
from diffuspeech.models.reconstructor import Reconstructor
from diffuspeech.models.spans import scale_spans
from diffuspeech.train.config import TrainConfig
from diffuspeech.train.loop import train

TEXT = "please leave your message after the tone when done hang up or press the pound key"


@pytest.fixture(scope="module", params=[False, True], ids=["diffusion", "autoregressive"])
def model(tmp_path_factory, request):
    "A decoder after four updates"
    folder = tmp_path_factory.mktemp("durations")
    prepare_clips(folder, train=6, dev=2)
    save_random_models(folder)
    run = TrainConfig(
        "diffuspeech.tasks.decoder:DecoderTask",
        str(folder),
        dict(dim=48, ffn_dim=64, embedding_dim=32, durations=True, spelling=True, causal=request.param),
        dict(recogniser=f"{folder}/recogniser", taste=dict(rank=4, dim=16)),
        steps=4,
        lr=3e-3,
        warmup_steps=1,
        ema_decay=0.0,
        precision="fp32",
        batch_seconds=20.0,
    )
    train(run, folder / "run", device="cpu", progress_bar=False)
    return Reconstructor.from_pretrained(folder / "run" / "model", recogniser=folder / "recogniser")


def random_decoder(**config):
    torch.manual_seed(0)
    table = torch.randint(1, 27, (20, 3), dtype=torch.uint8)
    shape = dict(text_vocab_size=20, vector_dim=8, speech_vocab_size=30, dim=32, embedding_dim=16, ffn_dim=48)
    decoder = SpeechDecoder(
        DecoderConfig(durations=True, spelling=True, **shape, **config), letter_table=table
    )
    lengths = torch.tensor([6, 3])
    condition = Condition(torch.randint(0, 20, (2, 6)), lengths, torch.randn(2, 6, 8))
    durations = fit_durations(0.5 + torch.rand(2, 6), lengths, torch.tensor([14, 9]))
    return decoder.eval(), replace(condition, durations=durations)


def test_a_cached_step_equals_the_whole():
    "Also after the last piece, and when rows have left the batch"
    decoder, condition = random_decoder(causal=True)
    run = generate(decoder.bind(condition), max_tokens=torch.tensor([20, 11]), temperature=0)
    past = torch.cat([torch.full((2, 1), decoder.config.mask_token_id), run.tokens[:, :-1]], 1)
    with torch.no_grad():
        logits = decoder.bind(condition)(past, run.lengths)[..., : decoder.config.mask_token_id]
    for row, n in enumerate(run.lengths.tolist()):
        assert torch.equal(logits[row, :n].argmax(-1), run.tokens[row, :n]), row
    alone = generate(decoder.bind(condition.row(1)), max_tokens=11, temperature=0)
    assert torch.equal(alone.tokens[0], run.tokens[1, : alone.tokens.shape[1]])


def test_a_position_follows_its_piece():
    "Another piece changes the inputs at its own positions most, and its place moves with the durations"
    decoder, condition = random_decoder()
    tokens, lengths = torch.full((1, 14), decoder.config.mask_token_id), torch.tensor([14])
    one = condition.row(0)
    piece, place, _ = piece_at(one.durations, 14)
    inputs = decoder.bind(one).inputs[0]
    other = replace(one, text=one.text.clone())
    other.text[0, 2] = (other.text[0, 2] + 1) % 20
    moved = (decoder.bind(other).inputs[0] - inputs).abs().amax(-1)
    own = piece[0] == 2
    assert moved[own].mean() > 1.5 * moved[~own].mean()
    later = replace(one, durations=one.durations.roll(1, 1))
    assert not torch.equal(piece_at(later.durations, 14)[1], place)
    without = replace(one, has_text=torch.tensor([False]))
    changed = replace(other, has_text=torch.tensor([False]))
    with torch.no_grad():
        a, b = (decoder.bind(c)(tokens, lengths) for c in (without, changed))
    assert torch.equal(a, b), "a text that is left out has no influence, nor have its letters"


def test_the_length_is_the_sum_of_the_durations(model):
    condition, _ = model.encode([load_clip()], [TEXT])
    predicted = model.decoder.predict_durations(condition)
    assert int(model.canvas_lengths(condition, "predicted")) == int(predicted.sum().ceil())
    assert int(model.canvas_lengths(condition, "eos")) > int(model.canvas_lengths(condition, "predicted"))
    scaled = model.canvas_lengths(condition, "predicted", scale=1.5)
    assert int(scaled) == int((predicted.sum() * 1.5).ceil())
    with pytest.raises(ValueError, match="leave q out"):
        model.canvas_lengths(condition, "predicted", q=0.9)
    fitted = model.with_durations(condition, torch.tensor([77])).durations
    assert int(fitted.sum()) == 77
    own = model.with_durations(condition).durations
    assert int(own.sum()) == round(float(predicted.sum()))


@pytest.mark.parametrize("length", ["given", "ratio", "predicted", "eos"])
def test_every_length_gives_speech(model, length):
    options = {} if model.decoder.config.causal else dict(steps=2)
    out = model.reconstruct(load_clip(), TEXT, length=length, check_words=False, **options)
    assert int(out.lengths) >= (length != "eos")  # it may end at once, with such weights
    assert len(out.waves[0]) == int(out.lengths) * model.hop_length
    if length == "given":
        assert int(out.lengths) == -(-len(load_clip()) // model.hop_length)


def test_an_infill_keeps_what_is_spoken_elsewhere(model):
    if model.decoder.config.causal:
        with pytest.raises(ValueError, match="cannot fill in"):
            model.infill(load_clip(), TEXT, [(1.0, 1.5)])
        return
    model.max_span = None
    wave, tokens = load_clip(), model.codec.encode(load_clip()[None])[0][0]
    same = model.infill(wave, TEXT, [(1.0, 1.5)], steps=2)
    kept = [*range(25), *range(38, len(tokens))]
    assert torch.equal(same.tokens[0][kept], tokens[kept])
    new = TEXT.replace("message", "telephone number and message")
    longer = model.infill(wave, TEXT, [(0.8, 1.3)], new, steps=2)
    assert torch.equal(longer.tokens[0, :20], tokens[:20])
    assert torch.equal(longer.tokens[0, -100:], tokens[-100:])
    condition, _ = model.encode([wave], [TEXT])
    known = model.recorded_durations(wave, condition, len(tokens))
    assert int(known.sum()) == len(tokens)
    other = Condition(*model.encode_text([new]))
    carried, fixed, changes = model.carry(replace(condition, durations=known), other)
    more = carried.sum() - len(tokens)
    assert sum(extra for _, extra in changes) == pytest.approx(float(more), abs=1e-3)
    masked = torch.arange(30, 36)
    canvas = same.tokens[0].index_fill(0, masked, model.decoder.config.mask_token_id)
    again = same.resume(canvas, 0, text=new, steps=2)
    assert torch.equal(again.tokens[0, :30], same.tokens[0, :30]) and (again.tokens[0] < 4096).all()


def test_a_change_counts_to_the_span_that_is_nearest():
    old, durations = [1, 2, 3, 4, 5, 6], [10, 10, 10, 10, 10, 10]
    _, fixed, changes = carry_durations(old, durations, [1, 9, 3, 4, 8, 8, 6], [1, 5, 1, 1, 12, 13, 1])
    assert fixed == [True, False, True, True, False, False, True]
    assert changes == [(15.0, -5), (45.0, 15)]
    assert scale_spans([(10, 20), (40, 50)], changes) == [0.5, 2.5]

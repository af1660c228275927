"TASTE over a Whisper: what is trained, what is saved, and what a vector depends on"

import pytest
import torch
from small import save_random_whisper

from diffuspeech.asr.recognizer import load_asr, text_table
from diffuspeech.asr.whisper import Whisper
from diffuspeech.data.audio import load_clip
from diffuspeech.models.decoder import Condition, DecoderConfig, SpeechDecoder
from diffuspeech.tokenizers.taste import Taste

TEXT = torch.tensor([[5, 9, 30, 31, 7], [5, 9, 30, 0, 0]])
FSQ = dict(kind="fsq", layers=2)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return load_asr(save_random_whisper(tmp_path_factory.mktemp("whisper")))


@pytest.fixture(scope="module")
def states(whisper):
    "Two recordings, the second one shorter: keys, values and mask"
    wave = load_clip()[:48_000]
    lengths = torch.tensor([48_000, 20_000])
    with torch.no_grad():
        (keys, values), mask = whisper.encode(torch.stack([wave, wave]), lengths, (-1, 1))
    return keys, values, mask


def test_a_checkpoint_holds_what_was_trained_and_nothing_of_the_recognizer(whisper, states, tmp_path):
    taste = Taste.from_recogniser(whisper, rank=4, dim=16, value_layer=1, quantizer=FSQ).eval()
    before = taste.aggregate(*states, TEXT)
    optimizer = torch.optim.Adam(taste.parameters(), 0.1)
    taste.aggregate(*states, TEXT).square().sum().backward()
    optimizer.step()
    after = taste.aggregate(*states, TEXT)
    assert not torch.allclose(before, after, atol=1e-3)
    taste.save_pretrained(tmp_path)
    again = Taste.from_pretrained(tmp_path, whisper)
    assert torch.equal(again.aggregate(*states, TEXT), after)
    own = {tuple(t.shape) for name, t in taste.state_dict().items() if not name.startswith("quantizer")}
    assert all(4 in shape or 16 in shape for shape in own), "matrices of rank 4, and the projection to 16"
    for name, weight in whisper.decoder.layers.named_parameters():
        other = Whisper.from_pretrained(whisper.config._name_or_path).decoder.layers.get_parameter(name)
        assert torch.equal(weight, other), "the recognizer is as it was"
    with pytest.raises(ValueError, match="give the recognizer, too"):
        Taste.from_pretrained(tmp_path)


def test_without_a_rank_the_layers_are_trained_and_the_subwords_are_not(whisper, tmp_path):
    taste = Taste.from_recogniser(whisper, layers=1)
    names = {name for name, _ in taste.named_parameters()}
    assert any("layers.0.encoder_attn.q_proj.weight" in name for name in names)
    assert not any("layers.1" in name or "embed_tokens" in name for name in names)
    assert all(p.requires_grad for p in taste.parameters())
    taste.save_pretrained(tmp_path)
    assert Taste.from_pretrained(tmp_path, whisper).fingerprint() == taste.fingerprint()


def test_a_vector_depends_on_its_own_row_and_on_the_text_before_it(whisper, states):
    taste = Taste.from_recogniser(whisper, rank=4, dim=16, value_layer=1, quantizer=FSQ).eval()
    keys, values, mask = states
    with torch.no_grad():
        both, n = taste.aggregate(*states, TEXT), int(mask[1].sum())
        alone = taste.aggregate(keys[1:, :n], values[1:, :n], mask[1:, :n], TEXT[1:, :3])
        assert torch.allclose(both[1, :3], alone[0], atol=1e-4)
        other = taste.aggregate(*states, TEXT.clone().index_fill_(1, torch.tensor([4]), 77))
        assert torch.equal(both[:, :4], other[:, :4]) and not torch.allclose(both[:, 4], other[:, 4])
        assert not torch.allclose(taste.aggregate(keys, keys, mask, TEXT), both), (
            "values have a layer of their own"
        )


def test_text_is_read_through_the_recognizers_embeddings(whisper, tmp_path):
    table = text_table(whisper)
    config = DecoderConfig(
        text_vocab_size=len(table), text_dim=32, vector_dim=0, speech_vocab_size=20, dim=32, ffn_dim=48
    )
    decoder = SpeechDecoder(config, table).eval()
    assert not any(table.shape == p.shape for p in decoder.state_dict().values())
    condition = Condition(TEXT, torch.tensor([5, 3]))
    decoder.save_pretrained(tmp_path)
    again = SpeechDecoder.from_pretrained(tmp_path, table)
    assert torch.equal(again.encode(condition)[0], decoder.encode(condition)[0])
    with pytest.raises(ValueError, match="embedded by a recognizer; give its table"):
        SpeechDecoder.from_pretrained(tmp_path).encode(condition)


@pytest.mark.parametrize("rank", [0, 4])
def test_frozen_weights_are_in_memory_once(whisper, rank):
    places = {p.data_ptr() for p in whisper.decoder.parameters()}
    needed = [p.requires_grad for p in whisper.decoder.parameters()]
    taste = Taste.from_recogniser(whisper, rank=rank, dim=16, quantizer=FSQ)
    layers = [t for name, t in taste.aggregator.named_buffers() if "layers" in name]
    layers += [p for name, p in taste.aggregator.named_parameters() if name.endswith("fc1.weight")]
    assert layers and all((t.data_ptr() in places) == bool(rank) for t in layers)
    taste.double()
    assert {p.data_ptr() for p in whisper.decoder.parameters()} == places
    assert [p.requires_grad for p in whisper.decoder.parameters()] == needed
    assert all(p.dtype == torch.float32 for p in whisper.decoder.parameters())

"Models of other people as denoisers: each preset gives what the model itself gives, and keeps the contract"

import pytest
import torch

from diffuspeech.data.audio import import_torchaudio

import_torchaudio()
import masked_models as models  # noqa: E402
from masked_models import MASK  # noqa: E402

from diffuspeech.diffusion.denoiser import Denoiser, check_denoiser, get_capabilities  # noqa: E402
from diffuspeech.diffusion.remask import WINO  # noqa: E402
from diffuspeech.diffusion.sample import sample  # noqa: E402
from diffuspeech.diffusion.wrap import PRESETS, wrap  # noqa: E402

FULL = torch.full((3,), 12)
LM = {
    "bert": models.bert,
    "modernbert": models.modernbert,
    "llada": models.Llada,
    "dream": models.dream,
    "mdlm": models.Mdlm,
}


def language_model(preset, seed=0):
    torch.manual_seed(seed)
    model = LM[preset]().eval()
    return model, wrap(model, preset, mask_token_id=MASK)


def ids(seed=0):
    return torch.randint(0, MASK, (3, 12), generator=torch.Generator().manual_seed(seed))


def own_logits(model, preset, x, t):
    "What the model's authors would compute, at every position"
    if preset == "mdlm":
        return model(x, -torch.log1p(-(1 - 1e-3) * t))
    if preset == "dream":
        both_ways = torch.ones(len(x), 1, x.shape[1], x.shape[1], dtype=torch.bool)
        logits = model(input_ids=x, attention_mask=both_ways).logits
        return torch.cat([logits[:, :1], logits[:, :-1]], 1)
    return model(input_ids=x).logits


@pytest.mark.parametrize("preset", LM)
@torch.no_grad()
def test_a_preset_gives_what_the_model_gives(preset):
    "ModernBERT's local layers stay local: a mask of all pairs would have opened them"
    model, denoiser = language_model(preset)
    x, t = ids(), torch.tensor([0.2, 0.7, 1.0])
    assert torch.allclose(denoiser(x, FULL, t).view(3, 12, -1), own_logits(model, preset, x, t), atol=1e-5)


@pytest.mark.parametrize("preset", LM)
@torch.no_grad()
def test_the_head_runs_where_it_is_asked(preset):
    _, denoiser = language_model(preset)
    x, where, t = ids(), torch.tensor([0, 5, 14, 30]), torch.ones(3)
    everything, seen = denoiser(x, FULL, t), []
    denoiser.head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    assert torch.allclose(denoiser(x, FULL, t, where), everything[where], atol=1e-5)
    assert seen == [4]


@torch.no_grad()
def test_without_a_head_logits_are_picked():
    model, denoiser = language_model("llada")
    everything, denoiser.head = denoiser(ids(), FULL), None
    where = torch.tensor([3, 17])
    assert torch.equal(denoiser(ids(), FULL, where=where), everything[where])


@pytest.mark.parametrize("preset", LM)
@torch.no_grad()
def test_rows_do_not_see_padding(preset):
    "Also for models that cannot be told of it"
    _, denoiser = language_model(preset)
    x, lengths, t = ids(), torch.tensor([12, 7, 9]), torch.tensor([0.3, 0.5, 0.9])
    whole = denoiser(x, lengths, t).view(3, 12, -1)
    for i, n in enumerate(lengths.tolist()):
        alone = denoiser(x[i : i + 1, :n], lengths[i : i + 1], t[i : i + 1])
        assert torch.allclose(alone, whole[i, :n], atol=1e-5)


@pytest.mark.parametrize("preset", LM)
def test_every_language_model_is_sampled_from(preset):
    _, denoiser = language_model(preset)
    canvas = ids()
    canvas[:, 4:] = MASK
    out = sample(denoiser, canvas, "conf_topk", MASK, steps=4, lengths=torch.tensor([12, 7, 9]))
    inside = torch.arange(12) < out.lengths[:, None]
    assert (out.tokens[inside] != MASK).all() and torch.equal(out.tokens[:, :4], canvas[:, :4])


@pytest.mark.parametrize("preset", ["bert", "modernbert", "dream"])
def test_wino_appends_its_shadow(preset):
    _, denoiser = language_model(preset)
    out = sample(denoiser, torch.full((2, 9), MASK), WINO(0.05, 0.06), MASK)
    assert (out.tokens != MASK).all()


def test_wino_on_a_model_without_masks():
    _, denoiser = language_model("llada")
    with pytest.raises(ValueError, match="Llada takes no positions or attention"):
        sample(denoiser, torch.full((2, 9), MASK), WINO(), MASK)


def test_gradients_reach_the_model():
    "A wrapped model is trained as it is"
    model, denoiser = language_model("dream")
    denoiser(ids(), FULL, where=torch.tensor([1, 2])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def omnivoice_inputs():
    g = torch.Generator().manual_seed(0)
    text = torch.randint(0, 40, (3, 4, 1), generator=g).expand(-1, -1, 3)
    voice = torch.randint(0, 16, (3, 2, 3), generator=g)
    prompt, is_audio = torch.cat([text, voice], 1), torch.tensor([[0, 0, 0, 0, 1, 1]] * 3).bool()
    canvas = torch.randint(0, 16, (3, 5, 3), generator=g)
    canvas[:, 1:4, 1:] = 16
    return prompt, is_audio, canvas


@torch.no_grad()
def test_omnivoice():
    torch.manual_seed(0)
    model = models.OmniVoice().eval()
    prompt, is_audio, canvas = omnivoice_inputs()
    denoiser = wrap(model, "omnivoice").bind(prompt, is_audio)
    own = model(torch.cat([prompt, canvas], 1).mT, torch.cat([is_audio, torch.ones(3, 5).bool()], 1)).logits
    own = own[:, :, 6:].transpose(1, 2)  # (B, L, Q, V), the audio alone
    found = denoiser(canvas, torch.full((3,), 5)).view(3, 5, 3, -1)
    assert torch.allclose(found, own, atol=1e-5)
    where = torch.tensor([4, 20, 44])
    some = denoiser(canvas[[2, 0]], torch.tensor([5, 3]), where=where[:2], batch=torch.tensor([2, 0]))
    assert torch.allclose(some[0], own[2].flatten(0, 1)[4], atol=1e-5)
    without = wrap(model, "omnivoice")
    out = sample(
        denoiser,
        canvas,
        "conf_topk",
        16,
        steps=3,
        cfg_scale=1.0,
        unconditional=without,
        lengths=torch.tensor([5, 3, 4]),
    )
    assert (out.tokens != 16)[torch.arange(5) < out.lengths[:, None]].all()


@torch.no_grad()
def test_omnivoice_with_prompts_of_different_lengths():
    "A prompt that is padded on the left gives what it gives alone"
    torch.manual_seed(0)
    model = models.OmniVoice().eval()
    prompt, is_audio, canvas = omnivoice_inputs()
    valid = torch.arange(6) >= torch.tensor([0, 2, 3])[:, None]
    whole = wrap(model, "omnivoice").bind(prompt, is_audio, valid)(canvas, torch.full((3,), 5))
    for i, n in enumerate((0, 2, 3)):
        bound = wrap(model, "omnivoice").bind(prompt[i : i + 1, n:], is_audio[i : i + 1, n:])
        alone = bound(canvas[i : i + 1], torch.tensor([5]))
        assert torch.allclose(alone, whole.view(3, 15, -1)[i], atol=1e-4)


@torch.no_grad()
def test_maskgct():
    "Codebook by codebook: the embeddings below, the mask above, as in its own sampling loop"
    torch.manual_seed(0)
    model = models.MaskGCT().eval()
    condition = model.cond_emb(torch.randint(0, 16, (2, 8)))
    denoiser = wrap(model, "maskgct").bind(condition)
    codes = torch.randint(0, 16, (2, 8, 3))
    canvas, t = codes.clone(), torch.tensor([0.5, 0.5])
    canvas[:, :, 2] = 16
    canvas[:, 2:, 1] = 16
    masked = canvas[..., 1] == 16
    x = model.token_emb[0](codes[..., 0]) + model.mask_emb.weight[0]
    x = x + torch.where(masked[..., None], model.mask_emb.weight[0], model.token_emb[1](codes[..., 1]))
    hidden = model.diff_estimator(x, t, condition + model.layer_emb.weight[1], torch.ones(2, 8))
    where = (torch.arange(2)[:, None] * 24 + torch.arange(8) * 3 + 1).flatten()
    found = denoiser(canvas, torch.full((2,), 8), t=t, where=where)
    assert torch.allclose(found[:, :16], model.to_logits[1](hidden).flatten(0, 1), atol=1e-5)
    assert (found[:, 16] == -torch.inf).all()
    calls = []
    model.diff_estimator.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    out = sample(denoiser, torch.full((2, 8, 3), 16), "levels(low_confidence)", 16, steps=6, temperature=1.0)
    assert (out.tokens < 16).all() and calls == [2] * 6, "a row is computed once a step"
    with pytest.raises(ValueError, match="use denoiser.bind"):
        wrap(model, "maskgct")(canvas, torch.full((2,), 8), t=t)


def test_every_preset_is_a_denoiser():
    made = {name: language_model(name)[1] for name in LM}
    made |= {"omnivoice": wrap(models.OmniVoice(), "omnivoice"), "maskgct": wrap(models.MaskGCT(), "maskgct")}
    assert set(made) == set(PRESETS)
    for name, denoiser in made.items():
        able = get_capabilities(denoiser)
        assert isinstance(denoiser, Denoiser) and able.mask_token_id is not None
        assert able.label_shift == (name == "dream") and able.time_input == (name in ("mdlm", "maskgct"))
        check_denoiser(denoiser, able.num_codebooks)
        with pytest.raises(ValueError, match="codebooks, the canvas has 7"):
            check_denoiser(denoiser, 7)

"Properties of every quantizer: round trips, padding, loss, float32, seeds"

import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from diffuspeech.tokenizers.quantize import (
    QuantizerConfig,
    QuantizerOutput,
    bitrate,
    codebook_usage,
    make_quantizer,
    perplexity,
    sequence_mask,
)

KINDS = {
    "fsq": dict(),
    "fsq grouped": dict(structure="grouped"),
    "fsq bare": dict(dim=3),
    "fsq uneven": dict(levels=(7, 5, 2), layers=3),
    "fsq uneven grouped": dict(levels=(2, 9), layers=3, structure="grouped"),
    "rvq": dict(kind="rvq", codebook_size=16, codebook_dim=6),
    "rvq bare": dict(kind="rvq", codebook_size=16, codebook_dim=8, kmeans_init=False),
    "rvq revived": dict(kind="rvq", codebook_size=16, codebook_dim=8, dead_code_threshold=1.0),
}
each = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
quick = settings(max_examples=12, deadline=None, derandomize=True)


def make(options, **more):
    return make_quantizer(**(dict(dim=8) | options | more))


def vectors(q, rows=3, width=40, seed=0):
    return torch.randn(rows, width, q.config.dim, generator=torch.Generator().manual_seed(seed))


def trained(options, **more):
    q = make(options, **more)
    for seed in range(3):
        q(vectors(q, seed=seed))
    return q


def same(a, b):
    return all(
        torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@each
def test_round_trip(options):
    q = trained(options)
    x = vectors(q, seed=9)
    for training in (False, True):
        codes, out = q.encode(x), q.train(training)(x)
        assert (
            torch.equal(out.codes, codes) and codes.dtype == torch.int64 and codes.shape == (3, 40, q.layers)
        )
        assert 0 <= codes.min() and codes.max() < q.codebook_size
        if not training:
            assert torch.equal(q.decode(codes), out.x_hat)
    q.eval()
    codes = q.encode(x)
    assert torch.equal(q.decode(codes, 2), q.decode(codes[..., :2])) and not torch.equal(
        q.decode(codes, 2), q.decode(codes)
    )


@each
@quick
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from([0.0, 0.7]),
)
def test_padding_changes_nothing(options, lengths, pad, training, dropout):
    "Codes, vectors, loss, and the update of the codebooks"
    a, b = (
        trained(options, quantizer_dropout=dropout).train(training),
        trained(options, quantizer_dropout=dropout).train(training),
    )
    lengths = torch.tensor(lengths)
    x = vectors(a, len(lengths), 40)
    wide = torch.full((len(lengths), 40 + pad, a.config.dim), torch.nan)
    wide[:, :40] = x.masked_fill(~sequence_mask(x, lengths)[..., None], torch.nan)
    one, two = a(x, lengths), b(wide, mask=sequence_mask(wide, lengths))
    assert (
        torch.equal(one.codes, two.codes[:, :40])
        and torch.equal(one.x_hat, two.x_hat[:, :40])
        and torch.equal(one.loss, two.loss)
        and same(a, b)
    )
    outside = ~sequence_mask(wide, lengths)
    assert (two.codes[outside] == -1).all() and (two.x_hat[outside] == 0).all() and torch.isfinite(two.loss)
    assert torch.equal(
        codebook_usage(one.codes, a.codebook_size), codebook_usage(two.codes, a.codebook_size)
    ) and torch.equal(perplexity(one.codes, a.codebook_size), perplexity(two.codes, a.codebook_size))


@pytest.mark.parametrize("options", [*KINDS.values(), dict(kind="none")], ids=[*KINDS, "none"])
def test_there_is_always_a_loss(options):
    q = make(options)
    for training in (True, False):
        loss = q.train(training)(vectors(q).requires_grad_()).loss
        assert loss.shape == () and loss.dtype == torch.float32 and (loss > 0) == (q.config.kind == "rvq")
        assert loss.requires_grad == (q.config.kind == "rvq")
    with pytest.raises(TypeError, match="loss"):
        QuantizerOutput(loss, loss)
    with pytest.raises(ValueError, match="loss=None must be a scalar tensor"):
        QuantizerOutput(loss, loss, None)
    for name in ("commit_loss", "quantized_loss"):
        with pytest.raises(AttributeError, match=name):
            getattr(q(vectors(q)), name)


@each
def test_same_seed_same_result(options):
    torch.manual_seed(1)
    a = trained(options, quantizer_dropout=0.5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = trained(options, quantizer_dropout=0.5)
    assert same(a, b) and torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert not same(a, trained(options, quantizer_dropout=0.5, seed=1)) or not (
        a.config.kind == "rvq" or list(a.parameters())
    )


@each
def test_resume(options, tmp_path):
    "Saved and loaded: the same codes bit for bit, and training continues exactly"
    q = trained(options, quantizer_dropout=0.5)
    save_file(q.state_dict(), tmp_path / "q.safetensors")
    config = QuantizerConfig(**json.loads(json.dumps(asdict(q.config))))
    again = make_quantizer(config)
    again.load_state_dict(load_file(tmp_path / "q.safetensors"))
    x = vectors(q, seed=5)
    assert (
        config == q.config
        and torch.equal(again.encode(x), q.encode(x))
        and torch.equal(again.decode(q.encode(x)), q.decode(q.encode(x)))
    )
    one, two = q(x), again(x)
    assert torch.equal(one.codes, two.codes) and torch.equal(one.loss, two.loss) and same(q, again)


@each
def test_float32_inside(options):
    "bfloat16 vectors, autocast and a model cast to bfloat16 give the codes of the same numbers in float32"
    q = trained(options).eval()
    x = vectors(q).bfloat16()
    want = q.encode(x.float())
    assert torch.equal(q.encode(x), want) and q(x).x_hat.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            torch.equal(q.encode(x), want)
            and torch.equal(q(x).codes, want)
            and q.decode(want).dtype == torch.float32
        )
    torch.nn.Sequential(q).bfloat16()
    assert torch.equal(q.encode(x), want) and all(t.dtype != torch.bfloat16 for t in q.state_dict().values())


@each
def test_gradient(options):
    "The input's gradient is one for any number of layers, also with dropout"
    size = {}
    for layers in (1, 4):
        q = make(options, layers=layers)
        x = vectors(q).mul(0.2).requires_grad_()
        q(vectors(q))
        out = q(x)
        (out.x_hat.square().sum() + out.loss).backward()
        assert torch.isfinite(x.grad).all() and (x.grad != 0).any()
        assert all(p.grad is not None and (p.grad != 0).any() for p in q.parameters())
        z = torch.zeros(5, 1, q.codebooks().shape[-1] * (layers if "grouped" in q.config.structure else 1))[
            :, 0
        ].requires_grad_()
        codes = torch.zeros(5, layers, dtype=torch.long)
        size[layers] = torch.autograd.grad(q.combine(q._lookup(codes), z, codes).sum(), z)[0].mean().item()
    assert size[1] == size[4] == 1, "at zero the bound has slope one, and layers do not add up"


@each
def test_dropped_layers(options):
    q = trained(options, quantizer_dropout=1.0)
    x = vectors(q, rows=60)
    out = q(x)
    kept = (out.codes >= 0).sum(-1)
    assert (kept == kept[:, :1]).all() and set(kept[:, 0].tolist()) == set(range(1, q.layers + 1)), (
        "a depth for each row, each from 1 to all"
    )
    row_keys = torch.arange(60)
    first = (q(x, row_keys=row_keys).codes >= 0).sum(-1)[:, 0]
    other = (q(x.flip(0), row_keys=row_keys.flip(0)).codes >= 0).sum(-1)[:, 0].flip(0)
    assert torch.equal(first, other), "with keys, a row's depth does not depend on its place"
    assert (q.encode(x) >= 0).all()
    q.eval()
    assert (q(x).codes >= 0).all()


def test_bits():
    assert (
        [make_quantizer("fsq", layers=n).bits for n in (2, 4, 8)]
        == [make_quantizer("rvq", layers=n).bits for n in (2, 4, 8)]
        == [18, 36, 72]
    )
    assert (
        make_quantizer("fsq", levels=(8, 6, 5), layers=1).codebook_size == 240
        and make_quantizer("none").bits == 0
    )
    assert round(bitrate(36, 528, 100)) == 190


def test_meta_device_and_empty_batches():
    with torch.device("meta"):
        assert make_quantizer("fsq").project_in.weight.shape == (3, 256)
        make_quantizer("rvq", dim=1280)
    for options in (dict(), dict(kind="rvq", codebook_dim=8, kmeans_init=False)):
        out = make_quantizer(dim=8, **options)(torch.zeros(2, 0, 8))
        assert out.codes.shape == (2, 0, 4) and out.loss == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(kind="vq"), 'kind="vq"'),
        (dict(layers=0), "layers=0"),
        (dict(dim=2.5), "dim=2.5"),
        (dict(levels=()), r"levels=\(\)"),
        (dict(levels=(8, 1)), r"levels=\[8, 1\]"),
        (dict(levels=(256, 256, 2)), "levels="),
        (dict(structure="stacked"), 'structure="stacked"'),
        (dict(quantizer_dropout=-0.1), "quantizer_dropout=-0.1"),
        (dict(codebook_dim=64), "codebook_dim=64"),
        (dict(kind="rvq", levels=(4, 4)), r"levels=\(4, 4\)"),
        (dict(kind="rvq", codebook_size=1), "codebook_size=1"),
        (dict(kind="rvq", decay=1.5), "decay=1.5"),
        (dict(kind="none", commitment_weight=0.5), "commitment_weight=0.5"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        make_quantizer(**options)


def test_bad_calls():
    q, x = make_quantizer("fsq", dim=8), torch.zeros(2, 5, 8)
    for call, words in (
        (lambda: q(x[..., :7]), r"x has shape \(2, 5, 7\), not \(B, L, 8\)"),
        (lambda: q(x, torch.tensor([5])), r"lengths has shape \(1,\)"),
        (lambda: q(x, torch.tensor([5, 5]), torch.ones(2, 5).bool()), "lengths and mask are both given"),
        (lambda: q(x, mask=torch.ones(2, 5)), "mask is torch.float32"),
        (lambda: q.encode(x / 0), "not finite"),
        (lambda: q.decode(torch.full((1, 1, 4), 512)), r"codes holds 512 at \(0, 0, 0\)"),
        (lambda: q.decode(torch.full((1, 1, 4), -2)), "codes holds -2"),
        (lambda: q.decode(torch.zeros(1, 1, 5).long()), r"shape \(1, 1, 5\)"),
        (lambda: q.decode(torch.zeros(1, 1, 4)), "torch.float32"),
        (lambda: q.decode(q.encode(x), 5), "layers=5 must be from 1 to 4"),
        (lambda: make_quantizer("none").encode(x), "kind='none' has no codes"),
        (lambda: bitrate(36, 1, 0), "seconds=0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(RuntimeError, match="codebooks are not initialized"):
        make_quantizer("rvq", dim=8).eval()(x)
    with pytest.raises(RuntimeError, match="codebooks are not initialized"):
        make_quantizer("rvq", dim=8).decode(torch.zeros(1, 1, 4).long())

"""Masking and the loss, for any shape, law and region

Rows are independent, counts are exact, and only masked tokens count."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffuspeech.base import random
from diffuspeech.diffusion.corrupt import complement, corrupt, utterance_keys
from diffuspeech.diffusion.loss import NORMALIZERS, WEIGHTS, diffusion_loss, nelbo
from diffuspeech.diffusion.oracle import JointDistribution
from diffuspeech.diffusion.schedule import cosine, linear, stratified_times

VOCAB, MASK = 7, 7
LAWS = st.fixed_dictionaries(
    {
        "masking": st.sampled_from(["bernoulli", "count"]),
        "span": st.sampled_from([1.0, 3.0]),
        "codebooks": st.sampled_from(["full", "one"]),
        "schedule": st.sampled_from([linear, cosine]),
        "never_empty": st.booleans(),
    }
)
quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def batches(draw):
    "Tokens, lengths, what may be masked, and ids"
    rows, width, levels = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (rows, width) if levels == 1 and draw(st.booleans()) else (rows, width, levels)
    tokens = torch.randint(0, VOCAB, shape, generator=generator)
    lengths = torch.randint(0, width + 1, (rows,), generator=generator)
    maskable = torch.rand(rows, width, generator=generator) < 0.8
    return tokens, lengths, maskable, [f"utt-{draw(st.integers(0, 99))}-{i}" for i in range(rows)]


def network(seed: int = 0):
    "Logits, with a column for the mask, that depend on the tokens of the row and on the place alone"
    asked = []

    def denoiser(tokens, lengths, t=None, where=None, batch=None):
        asked.append(where)
        flat = tokens.flatten(1)
        rows = random.fold_in(torch.tensor(seed), 0) + (flat * torch.arange(1, flat.shape[1] + 1)).sum(1)
        place = torch.arange(flat.shape[1])
        table = random.uniform(
            random.fold_in(
                random.fold_in(random.mix(rows)[:, None, None], 1) + place[:, None], torch.arange(VOCAB + 1)
            )
        )
        return (4 * table).float().flatten(0, 1)[where]

    return denoiser, asked


@quick
@given(batches(), LAWS, st.integers(1, 6), st.randoms(use_true_random=False))
def test_rows_stand_alone(batch, law, pad, random):
    "Alone, padded or in another order, a row is masked alike"
    tokens, lengths, maskable, ids = batch
    whole = corrupt(tokens, utterance_keys(0, 3, ids), MASK, lengths=lengths, maskable=maskable, **law)
    order = random.sample(range(len(ids)), random.randint(1, len(ids)))
    wide = torch.full(
        (len(order), tokens.shape[1] + pad, *tokens.shape[2:]), MASK
    )  # padding may hold anything
    wide[:, : tokens.shape[1]] = tokens[order]
    some = corrupt(
        wide,
        utterance_keys(0, 3, [ids[i] for i in order]),
        MASK,
        lengths=lengths[order],
        maskable=torch.nn.functional.pad(maskable[order], (0, pad), value=True),
        **law,
    )
    assert (
        torch.equal(some.masked[:, : tokens.shape[1]], whole.masked[order])
        and not some.masked[:, tokens.shape[1] :].any()
    )
    assert torch.equal(some.target[:, : tokens.shape[1]], whole.target[order])
    assert torch.equal(some.t, whole.t[order]) and torch.equal(some.ratio, whole.ratio[order])
    if whole.weight is not None:
        assert torch.equal(some.weight, whole.weight[order])


@quick
@given(batches(), LAWS)
def test_masks_stay_inside(batch, law):
    "What is masked is maskable, what is not masked is as it was, and counts are exact"
    tokens, lengths, maskable, ids = batch
    c = corrupt(tokens, utterance_keys(1, 0, ids), MASK, lengths=lengths, maskable=maskable, **law)
    inside = (
        (maskable & (torch.arange(tokens.shape[1]) < lengths[:, None]))
        .view(*maskable.shape, *[1] * (tokens.dim() - 2))
        .expand_as(tokens)
    )
    assert not (c.masked & ~inside).any() and not (c.target & ~(c.masked & c.maskable)).any()
    assert torch.equal(c.x_t == MASK, c.masked) and torch.equal(c.x_t[~c.masked], tokens[~c.masked])
    n, k = c.maskable.flatten(1).sum(1), c.target.flatten(1).sum(1)
    if law["masking"] == "count":
        want = [
            min(max(1, round(r * m)), m)
            for r, m in zip((1 - law["schedule"].alpha(c.t)).tolist(), n.tolist())
        ]
        assert k.tolist() == want
    elif law["never_empty"]:
        assert (k >= n.clamp_max(1)).all()
    if law["codebooks"] == "full":
        assert torch.equal(c.target, c.masked) and torch.equal(c.maskable, inside)
    elif tokens.dim() == 3:
        for row in range(len(ids)):
            levels = c.maskable[row].any(0).nonzero().flatten().tolist()
            assert len(levels) <= 1
            for j in levels:
                assert not c.masked[row, :, :j].any() and torch.equal(
                    c.masked[row, :, j + 1 :], inside[row, :, j + 1 :]
                )


@quick
@given(batches(), LAWS)
def test_pairs_are_complementary(batch, law):
    tokens, lengths, maskable, ids = batch
    first = corrupt(tokens, utterance_keys(2, 0, ids), MASK, lengths=lengths, maskable=maskable, **law)
    second = complement(first)
    assert (
        torch.equal(first.target ^ second.target, first.maskable) and not (first.target & second.target).any()
    )
    assert torch.equal(second.x_t == MASK, second.masked) and torch.equal(
        first.masked & ~first.maskable, second.masked & ~second.maskable
    )
    assert torch.equal(complement(second).x_t, first.x_t)


@quick
@given(batches(), LAWS, st.sampled_from(WEIGHTS), st.sampled_from(NORMALIZERS))
def test_loss_is_made_of_rows(batch, law, weight, normalize):
    "The loss of a batch from those of its rows, as the normalizer's name says; parts of a batch add up to it"
    tokens, lengths, maskable, ids = batch
    denoiser, asked = network()

    def loss(rows, **more):
        c = corrupt(
            tokens[rows],
            utterance_keys(0, 0, ids[rows]),
            MASK,
            lengths=lengths[rows],
            maskable=maskable[rows],
            **law,
        )
        return c, diffusion_loss(denoiser, c, weight, normalize, **more)

    if weight == "elbo" and corrupt(tokens, utterance_keys(0, 0, ids), MASK, **law).weight is None:
        with pytest.raises(ValueError, match="no exact weight"):
            loss(slice(None))
        return
    c, whole = loss(slice(None))
    assert torch.equal(asked[-1], c.target.flatten().nonzero().squeeze(1)) and torch.isfinite(whole.loss)
    parts = [loss(slice(i, i + 1)) for i in range(len(ids))]
    own = {
        "masked": [p.count.item() for _, p in parts],
        "maskable": [c.maskable.sum().item() for c, _ in parts],
        "positions": (lengths * tokens[0, 0].numel()).tolist(),
        "row": [1] * len(ids),
        "batch": [1] * len(ids),
    }[normalize]
    want = sum(p.loss.item() * n for (_, p), n in zip(parts, own)) / max(sum(own), 1)
    assert whole.loss.item() == pytest.approx(want, rel=1e-4, abs=1e-7) and whole.denominator == max(
        sum(own), 1
    )
    added = sum(loss(slice(i, i + 1), denominator=whole.denominator)[1].loss.item() for i in range(len(ids)))
    assert added == pytest.approx(whole.loss.item(), rel=1e-4, abs=1e-7)
    assert torch.allclose(whole.nats, torch.cat([p.nats for _, p in parts])) and torch.equal(
        whole.count, torch.cat([p.count for _, p in parts])
    )
    assert all(p.loss == 0 for _, p in parts if p.count.item() == 0)


@quick
@given(batches(), st.sampled_from(WEIGHTS), st.sampled_from(NORMALIZERS))
def test_only_what_is_masked_counts(batch, weight, normalize):
    "Logits at unmasked places, or of the mask token, change nothing and get no gradient; none is written to"
    tokens, lengths, maskable, ids = batch
    c = corrupt(tokens, utterance_keys(0, 0, ids), MASK, lengths=lengths, maskable=maskable)
    hidden = c.target.flatten()
    table = torch.randn(
        tokens.numel(), VOCAB + 1, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    other = table.detach().clone()
    other[~hidden], other[:, MASK] = 50.0, 50.0
    before = table.detach().clone()
    value = diffusion_loss(lambda x, lengths, t, where: table[where], c, weight, normalize).loss
    assert value == diffusion_loss(lambda x, lengths, t, where: other[where], c, weight, normalize).loss
    value.backward()
    assert (
        torch.equal(table.detach(), before)
        and (table.grad[~hidden] == 0).all()
        and (table.grad[:, MASK] == 0).all()
    )
    assert (table.grad[hidden].abs().sum(1) > 0).all() and torch.isfinite(table.grad).all()


@pytest.mark.parametrize("masking", ["bernoulli", "count"])
def test_ratios_of_rows_fill_the_interval(masking):
    "One time a row: with one a token, every row would be about half masked"
    tokens = torch.zeros(512, 100, dtype=torch.long)
    for t in (None, stratified_times(random.key(0), 512)):
        share = (
            corrupt(tokens, utterance_keys(0, 0, range(512)), MASK, t=t, masking=masking)
            .masked.double()
            .mean(1)
        )
        assert (torch.histc(share, 10, 0, 1) > 25).all() and abs(share.std() - 12**-0.5) < 0.02
    with pytest.raises(ValueError, match=r"t has shape \(512, 100\); one for each of 512 rows"):
        corrupt(tokens, utterance_keys(0, 0, range(512)), MASK, t=torch.rand(512, 100))


def test_codebooks_weigh_what_they_are_told():
    "Weights are relative, and a level of weight zero is not learned"
    tokens = torch.randint(0, VOCAB, (3, 9, 2), generator=torch.Generator().manual_seed(0))
    c = corrupt(tokens, utterance_keys(0, 0, range(3)), MASK)
    table = torch.randn(tokens.numel(), VOCAB, requires_grad=True)
    values = [
        diffusion_loss(lambda x, lengths, t, where: table[where], c, codebook_weights=w).loss
        for w in (None, [1, 1], [8, 8], [1, 0], [0, 1])
    ]
    assert torch.allclose(values[0], values[1]) and torch.allclose(values[1], values[2])
    assert torch.allclose(values[3] + values[4], 2 * values[0])
    values[3].backward()
    assert (table.grad.view(3, 9, 2, -1)[:, :, 1] == 0).all()


def test_bound_of_a_part_is_the_conditional_likelihood():
    "With exact conditionals the bound on two places given two others is exact, and rows are independent"
    world = JointDistribution()
    maskable = torch.tensor([False, False, True, True]).expand(81, -1)
    want = -(world.p / world.p.view(9, 9).sum(1).repeat_interleave(9)).log()
    bound = nelbo(world, world.sequences, random.row_keys(0, 81), 3, maskable=maskable, num_samples=256)
    assert ((bound.nats - want).abs() < 5 * bound.std_error + 1e-6).all() and (bound.count == 2).all()
    alone = nelbo(
        world, world.sequences[5:6], random.row_keys(0, 81)[5:6], 3, maskable=maskable[5:6], num_samples=256
    )
    assert torch.allclose(alone.nats, bound.nats[5:6], rtol=1e-6)


def test_unknown_names_are_told_the_choices():
    tokens, row_keys = torch.zeros(2, 5, dtype=torch.long), utterance_keys(0, 0, "ab")
    c, (denoiser, _) = corrupt(tokens, row_keys, MASK), network()
    for call, message in (
        (
            lambda: corrupt(tokens, row_keys, MASK, masking="binomial"),
            "masking='binomial' is not one of bernoulli, count",
        ),
        (lambda: corrupt(tokens, row_keys, MASK, codebooks="all"), "codebooks='all' is not one of full, one"),
        (lambda: corrupt(tokens, row_keys[:1], MASK), r"row_keys has shape \(1,\)"),
        (
            lambda: corrupt(tokens, row_keys, MASK, maskable=torch.ones(2, 4, dtype=torch.bool)),
            r"shape \(2, 4\)",
        ),
        (lambda: corrupt(tokens, row_keys, 0), "mask id 0 is among the clean tokens"),
        (
            lambda: diffusion_loss(denoiser, c, weight="elob"),
            "weight='elob' is not one of elbo, plain, inverse_t",
        ),
        (
            lambda: diffusion_loss(denoiser, c, normalize="mean"),
            "normalize='mean' is not one of masked, maskable, positions, row, batch",
        ),
        (lambda: diffusion_loss(denoiser, c, codebook_weights=[1, 2]), "2 entries for 1 codebooks"),
        (
            lambda: nelbo(denoiser, tokens, row_keys, MASK, estimator="count"),
            "estimator='count' is not one of quadrature, counts",
        ),
        (lambda: nelbo(denoiser, tokens, row_keys, MASK, span=2.0), "no exact weight"),
        (lambda: nelbo(denoiser, tokens, row_keys, MASK, num_samples=1), "num_samples=1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

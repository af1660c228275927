"Our rules against independent code: token for token where nothing is drawn, in law where something is"

import pytest
import torch

from diffuspeech.base import random
from diffuspeech.data.audio import import_torchaudio
from diffuspeech.diffusion.blocks import Blocks
from diffuspeech.diffusion.metric import MetricPath, codes_to_digits, digits_to_codes
from diffuspeech.diffusion.oracle import JointDistribution
from diffuspeech.diffusion.predictions import sampling_probs
from diffuspeech.diffusion.rules import Ancestral, ConfTopK, ConfTopP, EntropyBound, topk_mask
from diffuspeech.diffusion.sample import sample, steps
from diffuspeech.diffusion.step import Rule
from diffuspeech.evaluate.law import exact_law, tv

VOCAB, MASK = 11, 11


@pytest.fixture(scope="module")
def diffusers():
    import_torchaudio()  # diffusers may import transformers, and that torchaudio
    return pytest.importorskip("diffusers")


def network(tokens, lengths, t=None, where=None, batch=None, gap=0.0):
    """Logits that depend on all tokens of a row and on nothing else; `gap` sets the likeliest token far apart

    The mask's are -inf, since the schedulers here would draw it."""
    place = torch.arange(tokens.shape[1])
    row = (tokens * (place + 1) ** 2).sum(1)
    u = random.uniform(
        random.fold_in(
            random.fold_in(random.mix(row)[:, None, None], 1) + 7919 * place[:, None], torch.arange(VOCAB + 1)
        )
    )
    logits = torch.where(u == u.amax(-1, keepdim=True), 5 * u + gap, 5 * u).float()
    logits[..., MASK] = -torch.inf
    return logits if where is None else logits.flatten(0, 1)[where]


def block_refinement_canvases(diffusers, denoiser, x, T, mask_id=MASK, generator=None, **kwargs):
    "The canvases that diffusers' scheduler goes through"
    scheduler = diffusers.BlockRefinementScheduler(block_length=x.shape[1], num_inference_steps=T)
    scheduler.set_timesteps(T)
    seen = []
    for n in range(T):
        logits = denoiser(x, torch.full((len(x),), x.shape[1]))
        x = scheduler.step(logits, n, x, mask_token_id=mask_id, generator=generator, **kwargs).prev_sample
        seen.append(x)
        if (x != mask_id).all():
            break
    return seen


def our_canvases(denoiser, x, rule, T, **kwargs):
    return [now.canvas.clone() for now in steps(denoiser, x, rule, MASK, steps=T, **kwargs)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b))


# BlockRefinementScheduler. Its quota is fixed by the step's number and the block's length, base + 1 for the
# first `remainder` steps; ours follows from the row's own masks, and rounds the other way. So they agree on
# blank rows whose length the steps divide, and are compared on these.


@pytest.mark.parametrize("L, T", [(24, 24), (24, 8), (24, 3), (32, 16), (5, 1)])
def test_most_confident_first(diffusers, L, T):
    "Greedy, by count: the same canvas after every step"
    blank = torch.full((6, L), MASK)
    theirs = block_refinement_canvases(diffusers, network, blank, T, temperature=0.0, threshold=2.0)
    assert same(theirs, our_canvases(network, blank, ConfTopK(), T))
    assert same(theirs, our_canvases(network, blank, ConfTopK("candidate"), T)), (
        "greedy, the drawn token is the likeliest"
    )


@pytest.mark.parametrize("threshold", [0.2, 0.35, 0.6, 0.95])
def test_threshold(diffusers, threshold):
    "At a quota of one both commit all that are sure, or the best one: ConfTopP without a number of steps"
    blank = torch.full((6, 24), MASK)
    blank[3:, :7] = 2  # at a quota of one, what is given does not matter
    theirs = block_refinement_canvases(diffusers, network, blank, 24, temperature=0.0, threshold=threshold)
    assert same(theirs, our_canvases(network, blank, ConfTopP(threshold), None))


class SureOrQuota(Rule):
    "With a quota above one they differ: theirs keeps the quota when it is ahead, ours then commits fewer"

    steps = None

    def choose(self, state, predictions):
        score = predictions.score("max")
        return topk_mask(score, (score > 0.35).sum(1).clamp_min(3)), None


def test_threshold_with_quota(diffusers):
    blank = torch.full((6, 24), MASK)
    theirs = block_refinement_canvases(diffusers, network, blank, 8, temperature=0.0, threshold=0.35)
    assert same(theirs, our_canvases(network, blank, SureOrQuota(), None))
    assert not same(theirs, our_canvases(network, blank, ConfTopP(0.35), 8))


@pytest.mark.parametrize(
    "top_k, top_p, temperature",
    [(None, 0.9, 1.0), (None, 0.3, 1.0), (4, 1.0, 1.0), (6, 0.7, 0.8), (1, 1.0, 1.3)],
)
def test_shaping(diffusers, top_k, top_p, temperature):
    "Temperature, then top-k, then top_p with the token that crosses the line kept: the same probabilities"
    scheduler = diffusers.BlockRefinementScheduler
    logits = 3 * torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    filtered = scheduler._top_p_filtering(scheduler._top_k_filtering(logits / temperature, top_k), top_p)
    assert torch.allclose(
        sampling_probs(logits, temperature, top_k, top_p)
        / sampling_probs(logits, temperature, top_k, top_p).sum(-1, keepdim=True),
        filtered.softmax(-1),
        atol=1e-6,
    )


# In law. All three draw a token everywhere and commit where the drawn one is likeliest; BlockRefinement and
# aMUSEd can do nothing else, and ours does it with score="candidate".


def two_sample_p_value(a, b):
    "Chance of two histograms of equal size so far apart, if they have one law; small cells are put together"
    few = a + b < 20
    a, b = (torch.cat([h[~few], h[few].sum()[None]]) for h in (a, b))
    a, b = a[a + b > 0], b[a + b > 0]
    return torch.special.gammaincc(
        torch.tensor((len(a) - 1) / 2, dtype=torch.float64), ((a - b) ** 2 / (a + b)).sum() / 2
    ).item()


def amused_canvases(diffusers, denoiser, x, T, mask_id, schedule, temperature, seed=0):
    "The canvases that diffusers' aMUSEd scheduler goes through"
    scheduler = diffusers.AmusedScheduler(mask_token_id=mask_id, masking_schedule=schedule)
    scheduler.set_timesteps(T, temperature=temperature)
    generator, seen = torch.Generator().manual_seed(seed), []
    for t in scheduler.timesteps:
        logits = denoiser(x, torch.full((len(x),), x.shape[1]))
        x = scheduler.step(logits, t, x, generator=generator).prev_sample
        seen.append(x)
    return seen


def test_lucky_draws_come_first(diffusers):
    "One token a step, exact conditionals: conf_topk has the joint's law; diffusers' two are low_confidence"
    joint, n = JointDistribution(), 10_000
    blank = torch.full((n, 4), joint.mask_id)
    theirs = block_refinement_canvases(
        diffusers,
        joint,
        blank,
        4,
        joint.mask_id,
        torch.Generator().manual_seed(0),
        temperature=1.0,
        threshold=2.0,
    )[-1]
    laws = {
        "block refinement": theirs,
        "aMUSEd": amused_canvases(diffusers, joint, blank, 4, joint.mask_id, "linear", (0, 0))[-1],
        "low_confidence": sample(
            joint, blank, ConfTopK("candidate"), joint.mask_id, steps=4, temperature=1.0
        ).tokens,
        "max": sample(joint, blank, ConfTopK(), joint.mask_id, steps=4, temperature=1.0).tokens,
    }
    h = {name: joint.histogram(x) for name, x in laws.items()}
    away = {name: tv(x, joint.p) for name, x in h.items()}
    print("distance to the joint:", {name: round(d, 3) for name, d in away.items()})
    assert two_sample_p_value(h["block refinement"], h["low_confidence"]) > 0.001
    assert two_sample_p_value(h["aMUSEd"], h["low_confidence"]) > 0.001
    assert (
        all(0.3 < away[name] < 0.5 for name in ("block refinement", "aMUSEd", "low_confidence"))
        and away["max"] < 0.04
    )
    assert two_sample_p_value(h["block refinement"], h["max"]) < 1e-6, "the test can tell"


def test_noise_on_positions(diffusers):
    "aMUSEd's temperature is Gumbel noise on the log score, as position_temperature; (2, 2) keeps it constant"
    joint, n = JointDistribution(), 20_000
    blank = torch.full((n, 4), joint.mask_id)
    theirs = amused_canvases(diffusers, joint, blank, 4, joint.mask_id, "linear", (2, 2))[-1]
    mine = sample(
        joint, blank, ConfTopK("candidate"), joint.mask_id, steps=4, temperature=1.0, position_temperature=2.0
    ).tokens
    assert two_sample_p_value(joint.histogram(theirs), joint.histogram(mine)) > 0.001
    still = sample(joint, blank, ConfTopK("candidate"), joint.mask_id, steps=4, temperature=1.0).tokens
    assert two_sample_p_value(joint.histogram(theirs), joint.histogram(still)) < 1e-6, "the test can tell"


# AmusedScheduler always draws, so the network is made certain: the likeliest token has nearly all the mass,
# and no two places the same. Its cosine leaves floor(L cos), ours ceil(L cos), a token apart where L cos is
# no whole number; with its own as masking schedule the runs are the same token for token. (Not at
# L = 40, T = 12: there a step leaves 40 cos 60 degrees = 20, of which their float32 makes 19.)


@pytest.mark.parametrize("L, T", [(24, 8), (40, 11), (17, 5)])
def test_cosine(diffusers, L, T):
    def sure(*args, **kwargs):
        return network(*args, **kwargs, gap=8.0)

    blank = torch.full((3, L), MASK)
    theirs = amused_canvases(diffusers, sure, blank, T, MASK, "cosine", (0, 0))

    def floored(x):
        return ((L * torch.cos(torch.pi / 2 * x)).floor().clamp_min(1) / L).masked_fill(x >= 1, 0)

    assert same(theirs, our_canvases(sure, blank, ConfTopK(), T, masking_schedule=floored))
    left = [
        [int((x[0] == MASK).sum()) for x in run]
        for run in (theirs, our_canvases(sure, blank, ConfTopK(), T, masking_schedule="cosine"))
    ]
    assert all(0 <= b - a <= 1 for a, b in zip(*left)), left


# EntropyBoundScheduler works on uniform noise: what it does not accept it draws anew at random, and nothing
# is committed for good. So whole runs cannot agree; the accepted set is the same function of the logits, at
# the temperature that it anneals, here held constant.


@pytest.mark.parametrize("bound", [0.05, 0.5, 2.0, 10.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_bound(diffusers, bound, temperature):
    logits = (
        6
        * torch.randn(64, 30, VOCAB, generator=torch.Generator().manual_seed(1))
        * torch.rand(64, 30, 1, generator=torch.Generator().manual_seed(2))
    )
    scheduler = diffusers.EntropyBoundScheduler(entropy_bound=bound, t_max=temperature, t_min=temperature)
    accepted = scheduler.step(
        logits, 0, torch.zeros(64, 30, dtype=torch.long), generator=torch.Generator().manual_seed(0)
    ).accepted_index

    def fixed(tokens, lengths, t=None, where=None, batch=None):
        return torch.nn.functional.pad(logits / temperature, (0, 1), value=-torch.inf).flatten(0, 1)[where]

    run = next(iter(steps(fixed, torch.full((64, 30), MASK), EntropyBound(bound), MASK)))
    assert torch.equal(run.canvas != MASK, accepted)
    assert 1 < accepted.sum(1).double().mean() < 30, "neither one nor all"


# VQDiffusionScheduler is a process with a mask and, beside it, uniform noise. Without the latter (1e-6 of
# it, since it takes logarithms) it is ours.


@pytest.mark.parametrize("T", [2, 4, 8])
def test_the_reverse_of_masking(diffusers, T):
    "The law of T steps from its posterior, over all 256 canvases, is that of Ancestral"
    joint, eps = JointDistribution(), 1e-6
    scheduler = diffusers.VQDiffusionScheduler(
        num_vec_classes=joint.vocab_size + 1,
        num_train_timesteps=T,
        alpha_cum_start=1 - 1 / T - eps,
        alpha_cum_end=eps,
        gamma_cum_start=1 / T,
        gamma_cum_end=1 - 2 * eps,
    )
    c = joint.canvases
    log_p = joint.table[..., :-1].log().clamp_min(-70).transpose(1, 2).float()  # it takes no -inf
    law = torch.zeros(len(c), dtype=torch.float64)
    law[joint.index(torch.full((4,), joint.mask_id))] = 1
    for t in reversed(range(T)):
        kernel = (
            scheduler.q_posterior(log_p, c, torch.full((1,), t)).exp().transpose(1, 2).double()
        )  # (canvases, places, vocab_size + 1)
        law = law @ torch.stack([kernel[:, i, c[:, i]] for i in range(4)]).prod(0)
    whole = (c != joint.mask_id).all(1)
    theirs = torch.zeros_like(joint.p).index_add_(0, joint.index(c[whole], joint.vocab_size), law[whole])
    assert abs(theirs.sum() - 1) < 1e-3
    assert tv(theirs, exact_law(joint, Ancestral(), T)) < 1e-4


@pytest.mark.parametrize("levels", [(8, 8, 8), (7, 5, 3), (4, 6, 3, 3)])
def test_fsq(levels):
    "Our grid is the quantizer's: numbers to levels and back, and distances, which its codes scale to a cube"
    quantizer = pytest.importorskip("vector_quantize_pytorch").FSQ(levels=list(levels))
    path = MetricPath(levels)
    every = torch.arange(path.size)
    theirs = quantizer.indices_to_level_indices(every).long()
    assert torch.equal(codes_to_digits(every, levels), theirs) and torch.equal(
        digits_to_codes(theirs, levels), every
    )
    cube = quantizer.indices_to_codes(every) * (torch.tensor(levels) // 2)
    assert torch.allclose(path.distance(every), torch.cdist(cube, cube, p=1), atol=1e-4)
    x = torch.randn(1, 200, len(levels), generator=torch.Generator().manual_seed(0))
    quantized, numbers = quantizer(x)
    at = quantized[0] * (torch.tensor(levels) // 2)
    assert torch.allclose(
        path.distance(numbers[0].long()).gather(1, numbers.long().expand(200, -1)),
        torch.cdist(at, at, p=1),
        atol=1e-4,
    )


# LLaDA's generating loop, written from its algorithm: greedy, low_confidence. It divides the steps evenly
# among blocks and counts these from the prompt's end. It gives the remainder of a block's masks to the first
# steps, ours to the last: where there is none, the tokens are the same.


def llada_generate(model, prompt, steps, gen_length, block_length):
    "(1, P) to (1, P + gen_length)"
    x = torch.cat([prompt, torch.full((1, gen_length), MASK)], 1)
    per_block = steps // (gen_length // block_length)
    for end in range(prompt.shape[1] + block_length, x.shape[1] + 1, block_length):
        masks = int((x[:, :end] == MASK).sum())
        for i in range(per_block):
            p, token = model(x, torch.tensor([x.shape[1]])).double().softmax(-1).max(-1)
            confidence = p.masked_fill(x != MASK, -torch.inf)
            confidence[:, end:] = -torch.inf
            quota = masks // per_block + (i < masks % per_block)
            chosen = confidence[0].topk(quota).indices
            x[0, chosen] = token[0, chosen]
    return x


def length_network(tokens, lengths, **call):
    "The network above, blind to padding"
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    return network(tokens.masked_fill(padding, 0), lengths, **call)


@pytest.mark.parametrize("gen_length, block_length, T", [(24, 8, 24), (24, 8, 12), (32, 16, 8), (32, 32, 16)])
def test_llada(gen_length, block_length, T):
    "Prompts that end anywhere, each alone and all in one batch: LLaDA's tokens, with origin=prompt_lengths"
    prompt_lengths = torch.tensor([3, 5, 8, 13])
    g = torch.Generator().manual_seed(T)
    prompts = [torch.randint(0, VOCAB, (1, n), generator=g) for n in prompt_lengths.tolist()]
    theirs = [llada_generate(length_network, p, T, gen_length, block_length) for p in prompts]
    canvas = torch.full((4, 13 + gen_length), MASK)
    for row, prompt in zip(canvas, prompts):
        row[: prompt.shape[1]] = prompt
    rule, whole = ConfTopK("candidate"), prompt_lengths + gen_length
    ours = sample(length_network, canvas, Blocks(rule, block_length, prompt_lengths), MASK, T, lengths=whole)
    for i, want in enumerate(theirs):
        assert torch.equal(ours.tokens[i, : whole[i]], want[0])
        n = prompt_lengths[i].item()
        alone = sample(
            length_network, canvas[i : i + 1, : n + gen_length], Blocks(rule, block_length, n), MASK, T
        )
        assert torch.equal(alone.tokens, want)
    if block_length < gen_length:
        plain = sample(length_network, canvas, Blocks(rule, block_length), MASK, T, lengths=whole)
        assert not torch.equal(plain.tokens, ours.tokens), "the test can tell"

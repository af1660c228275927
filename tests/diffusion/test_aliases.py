"""Options by other names give what the original gives

Token for token where nothing is drawn, in law where something is."""

import pytest
import torch
from test_parity import MASK, network, two_sample_p_value

from diffuspeech.diffusion.denoiser import Capabilities
from diffuspeech.diffusion.oracle import JointDistribution
from diffuspeech.diffusion.sample import sample, steps

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


def llada(prompt, T, gen_length, block_length, remasking="low_confidence", generator=None):
    "LLaDA's generate at temperature 0, from its description: the canvases after every step"
    x = torch.nn.functional.pad(prompt, (0, gen_length), value=MASK)
    blocks, start, seen = gen_length // block_length, prompt.shape[1], []
    for b in range(blocks):
        end, each = start + (b + 1) * block_length, T // blocks
        quota = block_length // each
        for n in range(each):
            p, token = network(x, torch.tensor([x.shape[1]])).double().softmax(-1).max(-1)
            score = torch.rand(x.shape, generator=generator) if remasking == "random" else p
            score = score.masked_fill(x != MASK, -torch.inf)
            score[:, end:] = -torch.inf
            k = quota + (n < block_length % each)
            at = score.topk(k, dim=1).indices
            x = x.scatter(1, at, token.gather(1, at))
            seen.append(x)
    return seen


@pytest.mark.parametrize("gen_length, block_length, T", [(16, 16, 8), (16, 8, 4), (24, 6, 12), (12, 4, 12)])
def test_gen_length_and_block_length(gen_length, block_length, T):
    how = dict(remasking="low_confidence", gen_length=gen_length, block_length=block_length)
    run = steps(network, PROMPT, mask_id=MASK, steps=T, **how)
    ours = [now.canvas.clone() for now in run]
    theirs = llada(PROMPT, T, gen_length, block_length)
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_random_remasking():
    "LLaDA's `random`: as many at each step, at places drawn uniformly"
    out = sample(
        network, PROMPT.expand(4000, -1), mask_id=MASK, remasking="random", gen_length=8, num_steps=4
    )
    first = (out.trajectory.commit_step[:, 5:] == 0).double()
    assert (first.sum(1) == 2).all() and (first.mean(0) - 0.25).abs().max() < 0.03
    generator = torch.Generator().manual_seed(0)
    theirs = torch.stack(
        [(llada(PROMPT, 4, 8, 8, "random", generator)[0][0, 5:] != MASK) for _ in range(400)]
    )
    assert (theirs.double().sum(1) == 2).all() and (theirs.double().mean(0) - 0.25).abs().max() < 0.1


def test_lengths_of_the_prompts():
    "With gen_length each row's masks stand behind its own end"
    lengths = torch.tensor([5, 2])
    out = sample(network, PROMPT.expand(2, -1), mask_id=MASK, lengths=lengths, max_new_tokens=6, num_steps=3)
    assert out.lengths.tolist() == [11, 8] and out.tokens[1, :2].tolist() == [3, 1]
    assert (out.trajectory.commit_step >= 0).sum(1).tolist() == [6, 6]


def dream_confidence(logits, alg, temperature, top_p, generator):
    "Dream's sample_tokens: candidates, and what they are ranked by"
    logits = logits / temperature if temperature else logits
    if top_p < 1:
        down, order = logits.softmax(-1).sort(descending=True)
        out = (down.cumsum(-1) - down) > top_p
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
    p = logits.softmax(-1)
    if temperature:
        token = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
        score = p.gather(-1, token[..., None])[..., 0]
    else:
        score, token = p.max(-1)
    if alg == "topk_margin":
        best = p.topk(2).values
        score = best[..., 0] - best[..., 1]
    if alg == "entropy":
        score = (p * torch.log(p + 1e-10)).sum(-1)
    return token, score


def dream(denoiser, x, mask_id, T, alg, alg_temp=None, temperature=0.0, top_p=1.0, seed=0, eps=1e-3):
    "Dream's loop, from its description; every row has as many masks"
    g, t = torch.Generator().manual_seed(seed), torch.linspace(1, eps, T + 1)
    lengths, L = torch.full((len(x),), x.shape[1]), x.shape[1]
    for i in range(T):
        logits = denoiser(x, lengths, where=torch.arange(x.numel())).view(len(x), L, -1).clone()
        logits[..., mask_id] = -torch.inf
        masked, share = x == mask_id, 1 - t[i + 1] / t[i] if i < T - 1 else 1
        token, score = dream_confidence(logits, alg, temperature, top_p, g)
        if alg == "origin":
            x = torch.where(masked & (torch.rand(x.shape, generator=g) < share), token, x)
            continue
        k = int(masked[0].sum() * share)
        score = score.double().masked_fill(~masked, -torch.inf)
        if alg_temp:
            at = (
                torch.multinomial((score / alg_temp).softmax(-1), k, generator=g)
                if k
                else torch.zeros(len(x), 0).long()
            )
        else:
            at = score.topk(k, 1).indices
        x = x.scatter(1, at, token.gather(1, at))
    return x


def dream_schedule(L, T, eps=1e-3):
    "Dream's counts as a masking schedule: it rounds down at each step"
    t, left = torch.linspace(1, eps, T + 1), [L]
    for i in range(T):
        left.append(left[-1] - (int(left[-1] * (1 - t[i + 1] / t[i])) if i < T - 1 else left[-1]))
    left = torch.tensor(left, dtype=torch.float64)
    return lambda x: left[(x * T).round().long()] / L


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_dream_greedy(alg, top_p):
    x = torch.full((6, 24), MASK)
    theirs = dream(network, x, MASK, 8, alg, top_p=top_p)
    how = dict(alg=alg, top_p=top_p, num_inference_steps=8, masking_schedule=dream_schedule(24, 8))
    assert torch.equal(sample(network, x, mask_id=MASK, **how).tokens, theirs)


@pytest.mark.parametrize("alg", ["origin", "maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("alg_temp", [None, 0.3])
def test_dream_in_law(alg, alg_temp):
    "At temperature 1 and with noise on the order: the histogram of whole canvases"
    joint, n = JointDistribution(), 10_000
    if alg == "origin" and alg_temp:
        with pytest.raises(ValueError, match="ranks nothing"):
            sample(
                joint, torch.full((1, 4), joint.mask_id), mask_id=joint.mask_id, alg=alg, alg_temp=alg_temp
            )
        return
    blank = torch.full((n, joint.length), joint.mask_id)
    theirs = dream(joint, blank, joint.mask_id, 3, alg, alg_temp, temperature=1.0)
    schedule = "linear" if alg == "origin" else dream_schedule(joint.length, 3)
    how = dict(alg=alg, alg_temp=alg_temp, temperature=1.0, steps=3, masking_schedule=schedule)
    ours = sample(joint, blank, mask_id=joint.mask_id, **how).tokens
    assert two_sample_p_value(joint.histogram(theirs), joint.histogram(ours)) > 0.001


def test_the_mask_is_the_one_the_denoiser_declares():
    def net(tokens, lengths, t=None, where=None, batch=None):
        return network(tokens, lengths, t, where)

    with pytest.raises(ValueError, match="mask_id is not given"):
        sample(net, PROMPT, gen_length=4)
    net.capabilities = Capabilities(mask_token_id=MASK)
    assert torch.equal(
        sample(net, PROMPT, gen_length=4).tokens, sample(net, PROMPT, mask_id=MASK, gen_length=4).tokens
    )


@pytest.mark.parametrize(
    "wrong, near", [("temprature", "temperature"), ("block_lenght", "block_length"), ("alg_tmp", "alg_temp")]
)
def test_an_unknown_option_names_the_nearest(wrong, near):
    with pytest.raises(TypeError, match=f"no option '{wrong}'; did you mean '{near}'"):
        sample(network, PROMPT, mask_id=MASK, gen_length=4, **{wrong: 1})

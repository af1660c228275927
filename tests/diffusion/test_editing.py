"Tokens that a run may mask again, the rules that look for wrong ones, and rules that keep places apart"

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sampler import RULES, TableNet, few_examples

from diffuspeech.diffusion.blocks import Dilated
from diffuspeech.diffusion.oracle import JointDistribution
from diffuspeech.diffusion.remask import DETECTORS, T2M, MaskPredict
from diffuspeech.diffusion.rules import DUS, Ancestral, ConfTopK, ConfTopP
from diffuspeech.diffusion.sample import sample, steps

V, M = 7, 6
EDITING = [name for name, rule in RULES.items() if rule.remasks]


def drafts(seed: int, n: int = 5, width: int = 12):
    "Full rows of different lengths, a prompt that must stay, and a few masks"
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, width + 1, (n,), generator=g)
    x = torch.randint(0, M, (n, width), generator=g)
    x[torch.rand(n, width, generator=g) < 0.1] = M
    editable = torch.rand(n, width, generator=g) < 0.7
    x[:, 0], editable[:, 0] = 3, False
    x[:, 1], editable[:, 1] = 2, True
    return x, lengths, editable


@pytest.mark.parametrize("name", EDITING)
@few_examples
@given(seed=st.integers(0, 10**6), strength=st.sampled_from([0.2, 0.5, 1.0]))
def test_only_what_is_editable_changes(name, seed, strength):
    "A row alone equals the row in a batch; what is not editable stays; nothing is masked at the end"
    x, lengths, editable = drafts(seed)
    seeds = torch.arange(len(x)) + seed
    how = dict(steps=6, temperature=1.0, strength=strength)

    def run(rows):
        parts = dict(lengths=lengths[rows], editable=editable[rows], seed=seeds[rows])
        return sample(TableNet(), x[rows], RULES[name], M, **parts, **how)

    out = run(torch.arange(len(x)))
    inside = torch.arange(x.shape[1]) < lengths[:, None]
    assert (out.tokens[inside] != M).all()
    fixed = (x != M) & ~editable | ~inside
    assert torch.equal(out.tokens[fixed], x[fixed])
    for i in (0, 3):
        alone = run(torch.tensor([i]))
        assert torch.equal(alone.tokens[0], out.tokens[i]) and alone.calls[0] == out.calls[i]


def test_a_rule_that_keeps_everything_is_refused():
    x, lengths, editable = drafts(0)
    with pytest.raises(ValueError, match="conf_topk never masks again"):
        sample(TableNet(), x, "conf_topk", M, editable=editable)


@pytest.mark.parametrize("name", ["p2", "mask_predict"])
@pytest.mark.parametrize("strength", [0.25, 0.5])
def test_strength_is_the_share_that_is_masked(name, strength):
    "Of 40 places and 5 steps, as many masks as the last part of the schedule has"
    x = torch.randint(0, M, (1, 40), generator=torch.Generator().manual_seed(1))
    how = dict(editable=torch.ones_like(x, dtype=torch.bool), strength=strength, steps=5)
    t = sample(TableNet(), x, RULES[name], M, **how).trajectory
    left = [int((canvas == M).sum()) for canvas in t.canvases]
    assert left == [round(40 * strength * (1 - n / 5)) for n in range(1, 6)]


def test_what_is_set_by_hand_stays():
    x, lengths, editable = drafts(2)
    run = steps(TableNet(), x, MaskPredict(), M, steps=6, lengths=lengths, editable=editable)
    next(iter(run))
    run.set_token(0, 1, 5)
    assert run.finish().tokens[0, 1] == 5


# T2M


class Recorded:
    "A network, and the probabilities that it gave at each call"

    def __init__(self, net):
        self.net, self.seen = net, []

    def __call__(self, tokens, lengths, t=None, where=None, batch=None):
        logits = self.net(tokens, lengths, t=t, where=where, batch=batch)
        clean = logits.clone()
        clean[:, M:] = -torch.inf
        table = torch.full((tokens.numel(), logits.shape[1]), torch.nan)
        table[where] = clean.softmax(-1)
        self.seen.append((tokens.clone(), table.view(*tokens.shape, -1)))
        return logits


def doubted(detect: str, threshold: float, history: list, n: int) -> torch.Tensor:
    "What T2M should suspect at step n, from the definition: (1, N) bool"
    x, p = history[n]
    own = p.gather(-1, x[..., None].clamp_max(V - 1))[..., 0]
    if detect == "low_prob":
        return (own < threshold) & (x != M)
    if detect == "t2t":
        best, token = p.max(-1)
        return (best > threshold) & (token != x) & (x != M)
    before = history[n - 1][1].gather(-1, x[..., None].clamp_max(V - 1))[..., 0] if n else own
    return (before - own > threshold) & (x != M)


@pytest.mark.parametrize("detect, threshold", [("low_prob", 0.2), ("t2t", 0.4), ("logit_diff", 0.05)])
def test_t2m_by_its_definition(detect, threshold):
    "Each step masks what the definition suspects: all of it where no limit is in the way"
    found = 0
    for seed in range(20):
        net = Recorded(TableNet())
        rule = T2M(detect, threshold, max_remasks=99, max_share=1.0)
        t = sample(net, torch.full((1, 9), M), rule, M, steps=8, temperature=1.0, seed=seed).trajectory
        for n in range(t.steps - 1):
            before, after = t.canvas(n), t.canvas(n + 1)
            masked = (before != M) & (after == M)
            assert torch.equal(masked, doubted(detect, threshold, net.seen, n)), (seed, n)
            found += int(masked.sum())
    assert found > 10, "the test would show nothing"


@few_examples
@given(seed=st.integers(0, 10**6), times=st.integers(1, 3), share=st.sampled_from([0.1, 0.3, 1.0]))
def test_t2m_keeps_its_limits(seed, times, share):
    rule = T2M("low_prob", 0.6, max_remasks=times, max_share=share)
    x = torch.full((3, 20), M)
    t = sample(TableNet(), x, rule, M, steps=12, temperature=1.0, seed=seed).trajectory
    count = torch.zeros_like(x)
    for n in range(t.steps):
        before, after = t.canvas(n), t.canvas(n + 1)
        masked = (before != M) & (after == M)
        committed = (before != M).sum(1)
        assert (masked.sum(1) <= (share * committed).long().clamp_min(1)).all()
        count += masked
    assert count.max() <= times and count.max() > 0


@pytest.mark.parametrize("detect", DETECTORS)
def test_t2m_doubts_nothing_that_is_certain(detect):
    "An exact network gives 1 to what is visible: T2M is Conf-TopK, in as many calls"
    joint = JointDistribution()
    x = torch.full((50, joint.length), joint.mask_id)
    how = dict(steps=3, temperature=1.0, seed=3)
    a, b = (sample(joint, x, rule, joint.mask_id, **how) for rule in (T2M(detect), ConfTopK()))
    assert torch.equal(a.tokens, b.tokens) and a.nfe == b.nfe
    everywhere = torch.ones_like(x, dtype=torch.bool)
    full = sample(joint, a.tokens, T2M(detect), joint.mask_id, editable=everywhere)
    assert torch.equal(full.tokens, a.tokens) and full.nfe == 1, "one look, and nothing to do"


def test_mask_predict_keeps_the_surest():
    "What is masked again was committed with less confidence than all that stays"
    t = sample(TableNet(), torch.full((4, 20), M), MaskPredict(), M, steps=6, temperature=1.0).trajectory
    run = steps(TableNet(), torch.full((4, 20), M), MaskPredict(), M, steps=6, temperature=1.0)
    before, again = run.state.confidence.clone(), 0
    for now in run:
        gone = before.isnan().logical_not() & now.state.confidence.isnan()
        stays = now.state.confidence.nan_to_num(2).amin(1)
        assert (before.masked_fill(~gone, 0).amax(1) <= stays).all()
        before, again = now.state.confidence.clone(), again + int(gone.sum())
    assert again > 0 and torch.equal(run.result().tokens, t.final)


# Places that are kept apart


@pytest.mark.parametrize("size, base, calls", [(32, 2, 5), (8, 2, 3), (9, 3, 2), (10, 3, 2)])
@pytest.mark.parametrize("width", [40, 111])
def test_dus_takes_as_many_calls_as_divisions(size, base, calls, width):
    "Whatever the length; and those of one call are at least that call's distance apart"
    out = sample(TableNet(), torch.full((2, width), M), DUS(size, base), M, temperature=1.0)
    assert out.nfe == calls and (out.tokens != M).all()
    distance = size
    for call in range(calls):
        distance = max(distance // base, 1)
        places = (out.trajectory.commit_step[0] == call).nonzero()[:, 0]
        assert (places.diff() >= distance).all() and (places % distance == 0).all()


def test_dus_in_fewer_steps_takes_the_rest_at_the_last():
    out = sample(TableNet(), torch.full((1, 64), M), DUS(32), M, steps=2)
    places = torch.arange(64)
    assert torch.equal(out.trajectory.commit_step[0].long(), (places % 16 > 0).long()) and out.nfe == 2


@pytest.mark.parametrize("rule", [ConfTopP(0.3), ConfTopK(), Ancestral(), T2M()], ids=lambda rule: rule.name)
@few_examples
@given(seed=st.integers(0, 10**6), gap=st.integers(1, 9), Q=st.sampled_from([1, 3]))
def test_dilated_keeps_commits_apart(rule, seed, gap, Q):
    "By the gap times the share that is masked, but for the last step, which takes what is left"
    x = torch.full((2, 24, Q), M)
    x[1, :7] = 2
    how = dict(steps=8, temperature=1.0, seed=seed)
    t = sample(TableNet(), x, Dilated(rule, gap), M, **how).trajectory
    assert (t.final != M).all() and (t.final[1, :7] == 2).all()
    for row in range(2):
        for n in range(min(t.steps, 7)):
            before, after = (t.canvas(k)[row] for k in (n, n + 1))
            now = -(-gap * int((before == M).sum()) // int((x[row] == M).sum()))
            for q in range(Q):
                places = ((before[:, q] == M) & (after[:, q] != M)).nonzero()[:, 0]
                assert (places.diff() >= now).all()


def test_dilated_with_gap_one_is_the_rule_itself():
    x = torch.full((3, 20), M)
    for rule in (ConfTopP(0.4), ConfTopK(), Ancestral()):
        a, b = (sample(TableNet(), x, r, M, steps=7, temperature=1.0) for r in (rule, Dilated(rule, 1)))
        assert torch.equal(a.tokens, b.tokens) and a.nfe == b.nfe

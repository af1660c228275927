"""Laws that every rule of the catalogue obeys, and one test for each defect found in other code bases

Rows are independent: what row i becomes depends on its own seed, canvas and logits, never on the other rows
of the batch, their lengths or padding."""

import dataclasses
import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffuspeech.base import random
from diffuspeech.diffusion import predictions
from diffuspeech.diffusion.blocks import Blocks, Delayed, Dilated, Levels
from diffuspeech.diffusion.catalogue import CATALOGUE, get_rule
from diffuspeech.diffusion.oracle import JointDistribution, MarkovChain
from diffuspeech.diffusion.predictions import (
    SCORES,
    Predictions,
    SamplingConfig,
    entropy,
    sample_categorical,
    sampling_probs,
)
from diffuspeech.diffusion.remask import T2M, WINO, ReMDM
from diffuspeech.diffusion.rules import (
    KLASS,
    PC,
    PMI,
    Ancestral,
    ConfTopK,
    ConfTopP,
    EntropyBound,
    Factor,
    FirstHitting,
    SlowFast,
)
from diffuspeech.diffusion.sample import sample, steps
from diffuspeech.diffusion.step import static_step

V, M = 7, 6
SPECIAL = {
    "pc": lambda: PC(torch.arange(1.0, V + 1)),
    "conf_topp": lambda: ConfTopP(0.4),
    "klass": lambda: KLASS(0.3, kl_threshold=0.5, history=1),
    "slowfast": lambda: SlowFast(0.2, 0.4),
    "wino": lambda: WINO(0.3, 0.35),
    "entropy_bound": lambda: EntropyBound(1.0),
    "t2m_low_prob": lambda: T2M("low_prob", 0.3),
    "t2m_t2t": lambda: T2M("t2t", 0.4),
    "t2m_logit_diff": lambda: T2M("logit_diff", 0.05),
}
RULES = {name: SPECIAL.get(name, entry.factory)() for name, entry in CATALOGUE.items()}
RULES |= {
    "blocks": Blocks(ConfTopK(), 3),
    "blocks(ancestral)": Blocks(Ancestral(), 4),
    "blocks(remdm)": Blocks(ReMDM(), 4),
    "blocks(threshold)": Blocks(ConfTopP(0.4), 3),
    "dilated": Dilated(ConfTopK(), 3),
    "dilated(t2m)": Dilated(T2M("low_prob", 0.3), 3),
}


def steps_of(name, number):
    "The number of steps to ask a rule for: none where it takes one for each mask"
    return number if RULES[name].takes_steps else None


few_examples = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


class TableNet:
    "Logits that are a hash of what a row may see: bit-equal for equal rows, whatever stands beside them"

    def __init__(self, V=V, size=4096, sharp=2.0):
        self.table = sharp * torch.randn(size, V, generator=torch.Generator().manual_seed(0))
        self.calls = []

    def __call__(self, tokens, lengths, t=None, where=None, batch=None, positions=None, attention=None):
        B, N = tokens.shape[0], tokens[0].numel()
        x = tokens.reshape(B, N)
        place = torch.arange(N) if positions is None else positions
        seen = (
            (torch.arange(N) // (N // tokens.shape[1]) < lengths[:, None])[:, None]
            if attention is None
            else attention
        )
        state = random.mix((place + 1) * 1_000_003 + x + 1).expand(B, N)
        context = torch.where(seen, state[:, None], 0).sum(-1).expand(B, N)  # (B, query)
        index = random.mix(context + place) % len(self.table)
        self.calls.append(len(where))
        return self.table[index.flatten()[where]]


def rows_of(seed: int, n: int, width: int):
    "Rows of all kinds: nothing given, a prompt, holes, and different lengths"
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (n,), generator=g)
    x = torch.where(
        torch.rand(n, width, generator=g) < torch.rand(n, 1, generator=g),
        torch.randint(0, V - 1, (n, width), generator=g),
        M,
    )
    x[:, 0] = M  # something to do in each
    return torch.where(torch.arange(width) < lengths[:, None], x, M), lengths


OPTIONS = st.fixed_dictionaries(
    {},
    optional=dict(
        temperature=st.sampled_from([0.0, 0.7, 1.0]),
        top_p=st.sampled_from([0.8, 1.0]),
        top_k=st.sampled_from([3, None]),
        masking_schedule=st.sampled_from(["linear", "cosine", "time_shift"]),
    ),
)


@pytest.mark.parametrize("name", RULES)
@few_examples
@given(seed=st.integers(0, 10**6), T=st.sampled_from([1, 2, 5, 9, 30, None]), kwargs=OPTIONS)
def test_rows_are_independent(name, seed, T, kwargs):
    "One row = many = permuted = padded, bit for bit; no mask is left, nothing given is changed"
    rule, n, width = RULES[name], 6, 9
    x, lengths = rows_of(seed, n, width)
    seeds = torch.arange(n) + seed
    if rule.uses_predictions and seed % 2:
        kwargs = kwargs | dict(position_temperature=1.0)

    def run(x, lengths, seeds):
        return sample(TableNet(), x, rule, M, steps=steps_of(name, T), seed=seeds, lengths=lengths, **kwargs)

    whole = run(x, lengths, seeds)
    inside = torch.arange(width) < lengths[:, None]
    assert (whole.tokens[inside] != M).all(), "a mask was left over"
    assert (whole.tokens == x)[(x != M) & inside].all(), "a given token was changed"
    assert (whole.tokens == x)[~inside].all(), "something was written beyond a row's length"
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = run(x[order], lengths[order], seeds[order])
    wide = run(torch.nn.functional.pad(x, (0, 5), value=M), lengths, seeds)
    assert torch.equal(shuffled.tokens, whole.tokens[order]) and torch.equal(
        shuffled.calls, whole.calls[order]
    )
    assert torch.equal(wide.tokens[:, :width], whole.tokens) and torch.equal(wide.calls, whole.calls)
    for i in range(0, n, 2):
        alone = run(x[i : i + 1], lengths[i : i + 1], seeds[i : i + 1])
        assert torch.equal(alone.tokens[0], whole.tokens[i]) and alone.calls[0] == whole.calls[i]
        a, b = alone.trajectory, whole.trajectory.row(i)
        assert (
            torch.equal(a.commit_step, b.commit_step)
            and torch.equal(a.confidence.nan_to_num(9), b.confidence.nan_to_num(9))
            and torch.equal(a.entropy.nan_to_num(9), b.entropy.nan_to_num(9))
        )
    repeated = run(
        x.repeat_interleave(6, 0)[:32], lengths.repeat_interleave(6)[:32], seeds.repeat_interleave(6)[:32]
    )
    assert torch.equal(repeated.tokens, whole.tokens.repeat_interleave(6, 0)[:32])


class Net(torch.nn.Module):
    "A small transformer in float32"

    def __init__(self, V=V, d=32):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = torch.nn.Embedding(V, d), torch.nn.Embedding(64, d)
        layer = torch.nn.TransformerEncoderLayer(d, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.body, self.head = (
            torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            torch.nn.Linear(d, V),
        )

    def forward(self, tokens, lengths, t=None, where=None, batch=None, positions=None, attention=None):
        place = torch.arange(tokens.shape[1]).expand_as(tokens) if positions is None else positions
        x = self.embed(tokens) + self.place(place)
        if attention is None:
            hidden = self.body(x, src_key_padding_mask=torch.arange(tokens.shape[1]) >= lengths[:, None])
        else:
            alone = ~attention.any(
                -1, keepdim=True
            )  # a query of padding sees nothing: let it see something, nobody reads it
            hidden = self.body(x, mask=~(attention | alone).repeat_interleave(4, 0))
        return 4 * self.head(hidden.flatten(0, 1)[where])


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_rows_are_independent_with_a_network(name):
    "With a real network in float32: the same tokens when greedy"
    net, rule = Net().eval(), RULES[name]
    x, lengths = rows_of(11, 8, 12)
    seeds = torch.arange(8)
    whole = sample(net, x, rule, M, steps=steps_of(name, 6), seed=seeds, lengths=lengths)
    for i in range(8):
        n = int(lengths[i])
        alone = sample(net, x[i : i + 1, :n], rule, M, steps=steps_of(name, 6), seed=seeds[i : i + 1])
        assert torch.equal(alone.tokens[0], whole.tokens[i, :n])


@few_examples
@given(seed=st.integers(0, 10**6))
@torch.no_grad()
def test_logits_do_not_depend_on_padding(seed):
    net = Net().eval()
    x, lengths = rows_of(seed, 5, 10)
    everywhere = torch.arange(50)
    logits = net(x, lengths, where=everywhere).view(5, 10, V)
    for i in range(5):
        n = int(lengths[i])
        alone = net(x[i : i + 1, :n], lengths[i : i + 1], where=torch.arange(n))
        assert (alone - logits[i, :n]).abs().max() < 1e-4


@pytest.mark.parametrize("name", [n for n, r in RULES.items() if r.takes_steps])
def test_one_step_greedy_is_the_same_for_all(name):
    x, lengths = rows_of(5, 16, 9)
    first = sample(TableNet(), x, Ancestral(), M, steps=1, lengths=lengths)
    other = sample(TableNet(), x, RULES[name], M, steps=1, lengths=lengths, seed=99)
    assert torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, r in RULES.items()
        if not r.denoiser_kwargs and "t2m" not in n and n not in ("klass", "pmi", "slowfast", "first_hitting")
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_fixed_step_compiles_and_agrees(name, temperature):
    "torch.compile(fullgraph=True), step by step beside the loop"
    x, lengths = rows_of(3, 4, 9)
    net, rule = TableNet(), RULES[name]
    run = steps(net, x, rule, M, steps=5, lengths=lengths, temperature=temperature)
    torch._dynamo.reset()
    compiled = torch.compile(static_step, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        for _ in range(2 if name not in ("conf_topk", "ancestral") else 5):
            if run.done:
                break
            state, active = run.step_state(), run.progress.active.clone()
            logits = net(
                run.state.x[active], run.state.lengths[active], where=torch.arange(len(active) * 9)
            ).view(len(active), 9, V)
            state.call_denoiser = state.uniforms = None  # the graph has no network in it, and no memory
            state.step = torch.tensor(state.step)
            tokens, _ = compiled(rule, state, logits)
            run.step()
            assert torch.equal(tokens, run.state.x[active])


@pytest.mark.needs("g++")
def test_one_compiled_graph_serves_every_step():
    "The whole way down to machine code, and no compilation after the first step"
    x, net, rule = torch.full((3, 9), M), TableNet(), Ancestral()
    run = steps(net, x, rule, M, steps=6, temperature=1.0)
    torch._dynamo.reset()
    compiled = torch.compile(static_step, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for k in range(6):
            state = run.step_state()
            state.call_denoiser = state.uniforms = None
            state.step = torch.tensor(k)
            logits = net(run.state.x, run.state.lengths, where=torch.arange(27)).view(3, 9, V)
            with torch.compiler.set_stance("fail_on_recompile" if k else "default"):
                tokens, _ = compiled(rule, state, logits)
            run.step()
            assert torch.equal(tokens, run.state.x)
            if len(run.progress.active) < 3:
                break
    assert k >= 3


@pytest.mark.parametrize(
    "wrap",
    [lambda r: r, Levels, Delayed, lambda r: Blocks(r, 3)],
    ids=["full", "levels", "delayed", "blocks"],
)
@pytest.mark.parametrize("rule", [ConfTopK(), Ancestral(), ReMDM(), ConfTopP(0.4)], ids=lambda r: r.name)
def test_several_codebooks(wrap, rule):
    x, lengths = torch.full((3, 8, 4), M), torch.tensor([8, 3, 5])
    x[0, :2] = 1
    whole = sample(
        TableNet(),
        x,
        wrap(rule),
        M,
        steps=8,
        lengths=lengths,
        temperature=1.0,
        vocab_sizes=[6, 4, 3, 2],
        seed=torch.arange(3),
    )
    inside = (torch.arange(8) < lengths[:, None])[..., None].expand_as(x)
    assert (
        (whole.tokens[inside] != M).all()
        and (whole.tokens[~inside] == M).all()
        and (whole.tokens[0, :2] == 1).all()
    )
    free = inside & (x == M)
    for q, size in enumerate([6, 4, 3, 2]):
        assert (whole.tokens[..., q][free[..., q]] < size).all()
    alone = sample(
        TableNet(),
        x[1:2, :3],
        wrap(rule),
        M,
        steps=8,
        temperature=1.0,
        vocab_sizes=[6, 4, 3, 2],
        seed=torch.tensor([1]),
    )
    assert torch.equal(alone.tokens[0], whole.tokens[1, :3])


# Upstream defects not to inherit, in the order of the list that the project keeps of them


def test_rescale_applies_eta_once():
    "Duo's `max-rescale` multiplies by eta twice"
    run = steps(TableNet(), torch.full((1, 8), M), ReMDM("rescale", eta=0.3), M, steps=4)
    run.step()
    state = run.step_state()
    assert torch.allclose(
        v_sigma := run.rule.sigma(state), 0.3 * ((1 - state.alpha_s) / state.alpha_t).clamp(max=1)
    ), v_sigma


def test_nucleus_keeps_the_crossing_token():
    "ReMDM's top_p drops the token that crosses p"
    p = torch.tensor([[0.4, 0.35, 0.2, 0.05]])
    for top_p, kept in ((0.3, 1), (0.4, 1), (0.41, 2), (0.75, 2), (0.76, 3), (0.96, 4)):
        assert (sampling_probs(p.log(), top_p=top_p) > 0).sum() == kept, top_p


@pytest.mark.parametrize("name", [n for n, r in RULES.items() if r.uses_predictions and not r.remasks])
def test_waiting_end_is_committed_last(name):
    "LLaDA's suppression of the end edits a tensor that nobody reads"
    eos, net = 0, TableNet()
    net.table[:, eos] += 2.5  # over-sure of the end, as networks trained on padding are
    x = torch.full((20, 9), M)
    free = sample(net, x, RULES[name], M, steps=9, temperature=1.0)
    last = sample(net, x, RULES[name], M, steps=9, temperature=1.0, eos_id=eos, eos="last")

    def early(out):
        t = out.trajectory
        blocks = torch.arange(9) // 3 if isinstance(RULES[name], Blocks) else torch.zeros(9)
        mate = blocks[:, None] == blocks
        real, end = out.tokens != eos, out.tokens == eos
        later = (
            (t.commit_step[:, None, :] > t.commit_step[:, :, None])
            & real[:, None, :]
            & mate
            & end[:, :, None]
        )
        return int(later.sum())

    assert early(last) == 0 and (early(free) > 0 or name == "left_to_right")
    barred = sample(net, x, RULES[name], M, steps=9, temperature=1.0, eos_id=eos, eos="suppress")
    assert (barred.tokens != eos).all()


def test_guidance_needs_no_lengths():
    "LLaDA's guidance stops at an undefined name when no attention mask is given"
    weak = TableNet(sharp=0.0)
    a = sample(TableNet(), torch.full((2, 9), M), ConfTopK(), M, steps=3, cfg_scale=2.0, unconditional=weak)
    b = sample(TableNet(), torch.full((2, 9), M), ConfTopK(), M, steps=3)
    assert a.nfe == 2 * b.nfe and torch.equal(a.tokens, b.tokens), (
        "against an unconditional answer that says nothing, guidance only sharpens"
    )


def test_counts_are_not_pooled_over_the_batch():
    "Dream's quota is the mean of the batch, Dimple's top-k over all rows: prompts overwritten, masks left"
    x = torch.full((3, 12), M)
    x[1, :11] = 2
    x[2, ::2] = 3
    out = sample(TableNet(), x, ConfTopK(), M, steps=4)
    assert (out.tokens != M).all() and (out.tokens == x)[x != M].all()
    per_step = [[int((out.trajectory.commit_step[i] == k).sum()) for k in range(4)] for i in range(3)]
    assert per_step[0] == [3, 3, 3, 3] and sum(per_step[1]) == 1 and sorted(per_step[2]) == [1, 1, 2, 2]


@pytest.mark.parametrize("name", [n for n, r in RULES.items() if not r.remasks])
def test_no_call_without_a_commit(name):
    "Dream's quota can be 0, and a call is made for nothing"
    net, x = TableNet(), torch.full((1, 9), M)
    x[0, 4:] = 1
    out = sample(net, x, RULES[name], M, steps=steps_of(name, 50), temperature=1.0)
    steps_that_commit = len(set(out.trajectory.commit_step[out.trajectory.commit_step >= 0].tolist()))
    assert out.nfe == steps_that_commit <= 4 and out.nfe == len(net.calls)


def test_lowest_entropy_first():
    "KLASS's fork sorts entropy the wrong way round"
    logits = torch.zeros(1, 3, V)
    logits[0, 0, 1], logits[0, 1, 1], logits[0, 2, 1] = 1.0, 6.0, 3.0
    out = sample(
        lambda x, n, where=None, **c: logits.flatten(0, 1)[where].clone(),
        torch.full((1, 3), M),
        ConfTopK("entropy"),
        M,
        steps=3,
    )
    assert out.trajectory.commit_step[0].tolist() == [2, 0, 1]


def test_scores_come_from_clean_logits():
    "Gumbel-perturbed values used as probabilities; temperature leaking into confidence"
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(1))
    u = torch.full((1, 5), 0.5).double()
    cold, hot = (
        Predictions(logits.clone(), torch.arange(5), (1, 5), u, SamplingConfig(temperature=T, top_p=0.5), [M])
        for T in (0.1, 5.0)
    )
    assert torch.equal(cold.score("max"), hot.score("max")) and torch.equal(
        cold.score("entropy"), hot.score("entropy")
    )
    assert not torch.equal(
        *(
            Predictions(
                logits.clone(),
                torch.arange(5),
                (1, 5),
                u,
                SamplingConfig(temperature=T, tempered_scores=True),
                [M],
            ).score("max")
            for T in (0.1, 5.0)
        )
    )


def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    "Gumbel noise in half or single precision has no tails, and acts as a lower temperature"
    n, p = 2_000_000, torch.tensor([[0.999, 1e-3 - 2e-5, 1e-5, 1e-5]])
    u = random.uniform(random.fold_in(torch.tensor(7), torch.arange(n)))
    seen = torch.bincount(sample_categorical(p.expand(n, -1), u), minlength=4)
    assert (seen[2:] > 5).all() and (seen[2:] < 45).all()  # 20 expected


def test_factor_is_not_off_by_one():
    "PC-Sampler's copy of the factor rule accepts the first token that fails"
    logits = torch.zeros(1, 4, V)
    for i, p in enumerate((0.9, 0.7, 0.6, 0.5)):  # (n + 1)(1 - c): 0.2, 0.9, 1.6, 2.5
        logits[0, i, 1] = torch.tensor(p / (1 - p) * (V - 2)).log()
    out = sample(
        lambda x, n, where=None, **c: logits.flatten(0, 1)[where].clone(),
        torch.full((1, 4), M),
        Factor(1.0),
        M,
    )
    assert (out.trajectory.commit_step[0] == 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("rule", [Ancestral, ReMDM, FirstHitting], ids=lambda r: r.__name__)
def test_calls_saved_change_nothing(rule):
    """MDLM's cache compares whole batches; here rows are skipped one by one

    The tokens are the same, bit for bit, as when every row is asked everything at every step."""

    class AskAll(rule):
        uses_predictions = True

        def needs_logits(self, state):
            return state.maskable | state.masked

        def alpha(self, state):
            return (
                rule.alpha(self, state) if rule is FirstHitting and "ratio" in state.cache else state.alpha_t
            )

        def choose(self, state, predictions):
            return super().choose(state, None)

    x, lengths = rows_of(2, 6, 9)
    lean, full = TableNet(), TableNet()
    n = 30 if rule.takes_steps else None
    a = sample(lean, x, rule(), M, steps=n, temperature=1.0, lengths=lengths)
    b = sample(full, x, AskAll(), M, steps=n, temperature=1.0, lengths=lengths)
    assert torch.equal(a.tokens, b.tokens) and sum(lean.calls) < sum(full.calls) / 2
    assert a.calls.sum() < b.calls.sum() or rule is FirstHitting, "which commits in every row at every step"


def test_drawn_confidence_is_listed_as_biased():
    "LLaDA's low_confidence is off at one token a step, and nobody says so"
    joint = JointDistribution()

    def far(rule):
        out = sample(joint, torch.full((20_000, 4), 3), rule, 3, steps=4, temperature=1.0)
        return (joint.histogram(out.tokens) / 20_000 - joint.p).abs().sum() / 2

    assert (
        far("low_confidence") > 0.3
        and far("conf_topk") < 0.03
        and CATALOGUE["low_confidence"].exact_when == "no"
    )


def test_a_prior_network_is_asked_once():
    chain = MarkovChain.random(vocab_size=6)
    plain = sample(chain, torch.full((3, 12), M), PMI(), M, steps=4)
    prior = sample(chain, torch.full((3, 12), M), PMI(prior=chain), M, steps=4)
    assert prior.nfe == plain.nfe + 1


def test_a_result_stays_as_it_was():
    run = steps(TableNet(), torch.full((2, 9), M), "ancestral", M, steps=9, temperature=1.0)
    for _ in zip(range(3), run):
        pass
    early = run.result()
    tokens, committed = early.tokens.clone(), early.trajectory.commit_step.clone()
    late = run.finish()
    assert (
        torch.equal(early.tokens, tokens)
        and torch.equal(early.trajectory.commit_step, committed)
        and (late.tokens != M).all()
    )


@pytest.mark.parametrize("name", ["ancestral", "conf_topk", "klass", "remdm_cap", "blocks(conf_topk)"])
def test_a_place_opened_again_is_its_rows_affair(name):
    "Pins before, during and after; the other rows are as if nothing had happened"

    def run(pins):
        r = steps(
            TableNet(),
            torch.full((3, 9), M),
            RULES.get(name, name),
            M,
            steps=6,
            temperature=1.0,
            seed=torch.arange(3),
        )
        for k, now in enumerate(r):
            for at, place, token in pins.get(k, []):
                r.set_token(at, place, token)
        for at, place, token in pins.get("end", []):
            r.set_token(at, place, token)
        return r.finish()

    plain, pinned = run({}), run({1: [(1, 4, 2)], 2: [(1, 4, M), (1, 0, 5)], "end": [(1, 7, M)]})
    assert (
        torch.equal(plain.tokens[[0, 2]], pinned.tokens[[0, 2]])
        and (pinned.tokens != M).all()
        and pinned.tokens[1, 0] == 5
    )


@pytest.mark.parametrize("name", ["ancestral", "conf_topk", "remdm_cap"])
def test_what_a_denoiser_may_be(name):
    "One under inference_mode; one with gradients"
    net = TableNet()
    table = net.table.clone()
    want = sample(net, torch.full((2, 9), M), name, M, steps=4, suppress_tokens=(0, 2))
    assert not torch.isin(want.tokens, torch.tensor([0, 2, M])).any()

    @torch.inference_mode()
    def frozen(tokens, lengths, **call):
        return net(tokens, lengths, **call)

    def learning(tokens, lengths, **call):
        return net(tokens, lengths, **call) * torch.ones((), requires_grad=True)

    for denoiser in (frozen, learning):
        run = steps(denoiser, torch.full((2, 9), M), name, M, steps=4, suppress_tokens=(0, 2))
        out = run.finish()
        assert torch.equal(out.tokens, want.tokens) and not run.state.confidence.requires_grad
    assert torch.equal(net.table, table)


@pytest.mark.parametrize("name", RULES)
def test_logits_stay_the_denoisers(name):
    "A view of its own table, one row expanded, a table in bf16: none is written to, none is refused"
    table = 2 * torch.randn(1, V, generator=torch.Generator().manual_seed(2))
    many = 2 * torch.randn(64, V, generator=torch.Generator().manual_seed(3))
    for own in (table.expand(64, V), many, many.bfloat16()):
        before = own.clone()

        def net(tokens, lengths, t=None, where=None, batch=None, positions=None, attention=None, own=own):
            return own[: len(where)]  # a view

        rule, x = RULES[name], torch.full((2, 9), M)
        out = sample(net, x, rule, M, steps=steps_of(name, 5), temperature=1.0, suppress_tokens=(0,))
        assert torch.equal(own, before) and not torch.isin(out.tokens, torch.tensor([0, M])).any()


def test_entropy_where_small_numbers_become_zero():
    "torch.set_flush_denormal: 0 log 0 was 0 times -inf"
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 1e-42], [1 / 3, 1 / 3, 1 / 3]])
    want = torch.tensor([0.0, 2.0, 3.0]).clamp_min(1).log()
    assert torch.set_flush_denormal(True), "not supported by this processor"
    try:
        found = entropy(p)
        run = sample(TableNet(sharp=200.0), torch.full((2, 9), M), "entropy", M, steps=3)
    finally:
        torch.set_flush_denormal(False)
    assert torch.allclose(found, want) and torch.allclose(entropy(p), want)
    assert not run.trajectory.entropy.isnan().any()
    assert torch.allclose(found, torch.special.entr(p).sum(-1))


def test_any_whole_number_of_steps():
    "numpy's integers are numbers, too"
    x = torch.full((1, 9), M)
    want = sample(TableNet(), x, "conf_topk", M, steps=2)
    for two in (np.int64(2), np.int32(2), torch.tensor(2)):
        assert sample(TableNet(), x, "conf_topk", M, steps=two).nfe == want.nfe == 2
    for wrong in (0, np.int64(0), 2.0, np.float64(2), "2"):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            sample(TableNet(), x, "conf_topk", M, steps=wrong)


class BareModel(torch.nn.Module):
    def forward(self, input_ids, attention_mask=None, **kwargs): ...


@pytest.mark.parametrize(
    "wrong, message",
    [
        (BareModel(), "BareModel takes input_ids.*A denoiser is .*where=None.*wrap"),
        (lambda tokens, lengths, t=None: None, "does not take where, batch.*A denoiser is .*wrap"),
        (
            lambda tokens, lengths, **call: torch.zeros(*tokens.shape, V),
            r"shape \(2, 9, 7\) for 18 positions.*\(n, V\)",
        ),
        (lambda tokens, lengths, **call: {"logits": None}, "returned dict, not a tensor.*where=None"),
    ],
    ids=["model", "no where", "shape", "not a tensor"],
)
def test_what_is_no_denoiser_is_told_the_contract(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sample(wrong, torch.full((2, 9), M), "conf_topk", M)
    with pytest.raises((TypeError, ValueError), match=message):
        sample(TableNet(), torch.full((2, 9), M), "conf_topk", M, cfg_scale=1.0, unconditional=wrong)


@pytest.mark.parametrize(
    "temperature, config", [(0.0, {}), (0.7, dict(top_k=5)), (1.0, dict(tempered_scores=True))]
)
@pytest.mark.parametrize(
    "name", ["conf_topk", "low_confidence", "margin", "entropy", "entropy_bound", "p2", "ancestral"]
)
def test_pieces_change_no_bit(name, temperature, config, monkeypatch):
    "Logits read three rows at a time, or all at once"
    x, lengths = rows_of(4, 5, 9)

    def run():
        how = dict(steps=4, lengths=lengths, temperature=temperature, **config)
        out = sample(TableNet(), x, RULES[name], M, **how)
        return [out.tokens, *(t.nan_to_num(9) for t in (out.trajectory.confidence, out.trajectory.entropy))]

    whole = run()
    monkeypatch.setattr(predictions, "CHUNK", 3 * V)
    assert all(torch.equal(a, b) for a, b in zip(whole, run()))


def test_options_are_those_of_the_config():
    "`sample` and `steps` name every option, with the defaults of `SamplingConfig`"
    shown = inspect.signature(sample).parameters
    assert list(shown) == list(inspect.signature(steps).parameters)
    for field in dataclasses.fields(SamplingConfig):
        assert shown[field.name].default == field.default
    assert all(a.default == inspect.signature(steps).parameters[n].default for n, a in shown.items())


# Defects of our own


@pytest.mark.parametrize("score", [name for name in SCORES if name != "entropy"])
def test_every_score_can_pass_the_threshold(score):
    "An entropy could not: its negative is never above a threshold between 0 and 1"
    out = sample(TableNet(sharp=8.0), torch.full((8, 12), M), ConfTopP(0.1, score), M)
    assert out.nfe < 12, "never more than the one token that is always committed"
    with pytest.raises(ValueError, match="score='entropy' has no threshold"):
        ConfTopP(score="entropy")


@pytest.mark.parametrize(
    "name", ["conf_topp", "factor", "entropy_bound", "klass", "slowfast", "blocks(threshold)"]
)
@few_examples
@given(T=st.integers(1, 9), seed=st.integers(0, 1000))
def test_no_rule_falls_behind_the_schedule(name, T, seed):
    "ConfTopP committed 1, 1, 1, 1, 1, 1, 1 and then 25 of 32 in the step that was the last"
    x, _ = rows_of(seed, 4, 18)
    rule = get_rule(name) if name in CATALOGUE else RULES[name]
    out = sample(TableNet(sharp=1.0), x, rule, M, steps=T, temperature=1.0)
    if isinstance(rule, Blocks):
        return  # counted within each block; here it is enough that it ends
    for row in out.trajectory.commit_step:
        free = int((row >= 0).sum())
        done = torch.stack([((row >= 0) & (row <= k)).sum() for k in range(T)])
        owed = free - torch.ceil(free * (1 - torch.arange(1, T + 1) / T) - 1e-9)
        assert (done >= owed).all(), (done, owed)


def test_noise_puts_a_zero_margin_last():
    "The logarithm of a zero margin counted as 0, the largest there is"
    logits = torch.zeros(1, 8, V)
    logits[0, :, 1] = 3.0
    logits[0, 5, 2] = 3.0  # two tokens alike: no margin

    def net(tokens, lengths, t=None, where=None, batch=None):
        return logits.flatten(0, 1)[where]

    for seed in range(20):
        out = sample(
            net, torch.full((1, 8), M), ConfTopK("margin"), M, steps=8, seed=seed, position_temperature=0.1
        )
        assert out.trajectory.commit_step[0, 5] == 7


def test_first_hitting_takes_no_number_of_steps():
    "With steps=2 it committed half of the canvas at once and called it exact"
    for rule in (FirstHitting(), Blocks(FirstHitting(), 3)):
        with pytest.raises(ValueError, match=r"first_hitting.* takes one step for each mask"):
            sample(TableNet(), torch.full((1, 9), M), rule, M, steps=2)


@pytest.mark.parametrize("option", ["strategy", "remasks_per_token", "eta", "conf_scale", "t_on"])
def test_psi_takes_its_own_options_only(option):
    "The strategies of ReMDM broke its marginals, the others were read by nothing"
    with pytest.raises(ValueError, match=f"the rule 'psi' has no option '{option}'"):
        get_rule("psi", **{option: 0.5})


OPTION_VALUES = {
    "threshold": st.floats(0.01, 0.99),
    "score": st.sampled_from(["max", "candidate", "margin"]),
    "factor": st.floats(0.1, 5),
    "gamma": st.floats(0.01, 5),
    "order": st.sampled_from(list(SCORES)),
    "history": st.integers(0, 4),
    "decay": st.floats(0, 1),
    "frequencies": st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    "weight": st.floats(0, 2),
    "patience": st.integers(1, 9),
    "kappa": st.floats(0, 1),
    "eta": st.floats(0, 1),
    "draft_threshold": st.floats(0.01, 0.99),
    "max_remasks": st.integers(1, 5),
    "max_share": st.floats(0.01, 1),
    "size": st.integers(2, 64),
    "base": st.just(2),
    "log_scores": st.booleans(),
}


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize(
    "wrapper", ["{}", "blocks({}, size=8)", "levels({})", "delayed({}, delay=2)", "dilated({}, gap=3)"]
)
@few_examples
@given(data=st.data())
def test_what_a_rule_prints_can_be_read_back(name, wrapper, data):
    known = [f.name for f in fields(get_rule(name)) if f.repr and f.name in OPTION_VALUES]
    if name == "remdm_conf":
        known.remove("eta")
    options = (
        {key: data.draw(OPTION_VALUES[key]) for key in data.draw(st.sets(st.sampled_from(known)))}
        if known
        else {}
    )
    rule = get_rule(wrapper.format(name), **options)
    again = get_rule(repr(rule))
    assert again == rule and repr(again) == repr(rule)

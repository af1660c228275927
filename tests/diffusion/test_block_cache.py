"A block-causal cache saves work and changes no token, for every rule that allows one"

import pytest
import torch

from diffuspeech.diffusion.blocks import Blocks
from diffuspeech.diffusion.catalogue import CATALOGUE
from diffuspeech.diffusion.denoiser import Capabilities
from diffuspeech.diffusion.rules import PC, ConfTopK, ConfTopP
from diffuspeech.diffusion.sample import sample, steps

V, M, BLOCK, WIDTH = 9, 8, 4, 32


class BlockCausalNet(torch.nn.Module):
    "Two layers of attention in float64, in which a position sees its own block of 4 and those before it"

    def __init__(self, cached: bool, d: int = 16, layers: int = 2, sharp: float = 3.0, seed: int = 0):
        super().__init__()
        self.capabilities = Capabilities(block_causal_cache=cached)
        self.sharp, self.width, self.num_positions = sharp, d, 0  # positions that went through the network
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.place = torch.nn.Embedding(V, d), torch.nn.Embedding(WIDTH, d)
            self.qkv = torch.nn.ModuleList(torch.nn.Linear(d, 3 * d) for _ in range(layers))
            self.mlp = torch.nn.ModuleList(torch.nn.Linear(d, d) for _ in range(layers))
            self.head = torch.nn.Linear(d, V)
        self.double()

    def hidden(self, tokens, lengths, position, keys):
        "(b, q, d) at `position` (b, q); its keys and values are written into `keys`, (b, L, d) each"
        self.num_positions += position.numel()
        x = self.embed(tokens.gather(1, position)) + self.place(position)
        key = torch.arange(tokens.shape[1])
        visible = (key // BLOCK <= position[..., None] // BLOCK) & (key < lengths[:, None, None])
        for qkv, mlp, (k, v) in zip(self.qkv, self.mlp, keys):
            query, new_k, new_v = qkv(torch.nn.functional.layer_norm(x, x.shape[-1:])).chunk(3, -1)
            at = position[..., None].expand_as(new_k)
            k.scatter_(1, at, new_k)
            v.scatter_(1, at, new_v)
            weight = (query @ k.mT).masked_fill(~visible, -torch.inf).softmax(-1)
            x = x + weight @ v
            x = x + mlp(x).tanh()
        return x

    def empty(self, rows, width):
        return [torch.zeros(2, rows, width, self.width, dtype=torch.float64) for _ in self.qkv]

    def forward(self, tokens, lengths, t=None, where=None, batch=None):
        position = torch.arange(tokens.shape[1]).expand_as(tokens)
        x = self.hidden(tokens, lengths, position, self.empty(*tokens.shape))
        return (self.sharp * self.head(x.flatten(0, 1)[where])).float()

    def start_cache(self):
        return NetCache(self)


class NetCache:
    "Keys and values of what is final, for each row up to where it is filled"

    def __init__(self, net):
        self.net, self.keys, self.events = net, net.empty(64, WIDTH), []
        self.filled, self.start, self.end = torch.zeros(3, 64, dtype=torch.int64)

    def fill(self, rows, tokens, upto):
        rows, tokens, upto = (x[self.filled[rows] < upto] for x in (rows, tokens, upto))
        if len(rows):
            self.run(rows, tokens, upto, self.filled[rows], upto, keep=True)
            self.filled[rows] = upto

    def run(self, rows, tokens, lengths, start, end, keep=False):
        "The positions from start to end of each row through the network, on top of what is cached"
        position = torch.minimum(start[:, None] + torch.arange(int((end - start).max())), end[:, None] - 1)
        keys = [k[:, rows, : tokens.shape[1]].clone() for k in self.keys]
        x = self.net.hidden(tokens, lengths, position, keys)
        for old, new in zip(self.keys, keys):
            if keep:
                old[:, rows, : tokens.shape[1]] = new
        return x

    def open_blocks(self, rows, tokens, start, end):
        if (start % BLOCK).any():
            raise ValueError(f"blocks must begin at multiples of {BLOCK}, not at {start.tolist()}")
        self.events.append(("open", rows.tolist(), start.tolist(), end.tolist()))
        self.filled[rows] = torch.minimum(self.filled[rows], start)
        self.fill(rows, tokens, start)
        self.start[rows], self.end[rows] = start, end

    def close_blocks(self, rows, tokens, start, end):
        self.events.append(("close", rows.tolist(), start.tolist(), end.tolist()))
        assert not ((tokens == M) & (torch.arange(tokens.shape[1]) < end[:, None])).any()
        self.fill(rows, tokens, end)

    def __call__(self, tokens, lengths, t=None, where=None, batch=None):
        start, end = self.start[batch], self.end[batch]
        x = self.run(batch, tokens, lengths, start, end)
        row, place = where // tokens.shape[1], where % tokens.shape[1]
        assert ((place >= start[row]) & (place < end[row])).all(), "asked outside the open block"
        return (self.net.sharp * self.net.head(x[row, place - start[row]])).float()


def ragged_canvas():
    "Prompts of different lengths, a hole, and rows of different lengths"
    x = torch.randint(0, M, (6, 26), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([26, 26, 21, 9, 26, 17])
    prompt = torch.tensor([0, 9, 4, 1, 13, 16])
    free = torch.arange(26) >= prompt[:, None]
    free[4] = False
    free[4, 5:8] = free[4, 21:23] = True
    return x.masked_fill(free, M), lengths


def same(a, b):
    a, b = a.trajectory, b.trajectory
    return torch.equal(a.final, b.final) and torch.equal(a.commit_step, b.commit_step)


RULES = [name for name, entry in CATALOGUE.items() if name not in ("pc", "wino")] + ["pc"]


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_a_cache_changes_no_token(name):
    "Whole runs, ragged and with prompts, with a step for each token, with several, and with blocks merged"
    rule = PC(torch.arange(1.0, V + 1)) if name == "pc" else CATALOGUE[name].factory()
    x, lengths = ragged_canvas()
    plain, cached = BlockCausalNet(cached=False), BlockCausalNet(cached=True)
    for size, T, temperature in ((4, None, 0.0), (8, 12, 1.0), (4, 3, 1.0), (4, 40, 0.7)):
        how = dict(
            steps=T if rule.takes_steps else None,
            temperature=temperature,
            lengths=lengths,
            seed=torch.arange(6),
        )
        want = sample(plain, x, Blocks(rule, size), M, **how)
        got = sample(cached, x, Blocks(rule, size), M, **how)
        assert same(got, want) and torch.equal(got.calls, want.calls)
    assert cached.num_positions < plain.num_positions


@torch.no_grad()
def test_blocks_are_opened_and_closed_row_by_row():
    "Many rows in one call, each at its own block"
    net = BlockCausalNet(cached=True)
    x, lengths = ragged_canvas()
    run = steps(net, x, Blocks(ConfTopP(0.5), 4), M, lengths=lengths)
    run.finish()
    events = run.network.denoiser.events
    opened = [(r, s, e) for kind, *lists in events if kind == "open" for r, s, e in zip(*lists)]
    closed = [(r, s, e) for kind, *lists in events if kind == "close" for r, s, e in zip(*lists)]
    assert sorted(opened) == sorted(closed) and len(set(opened)) == len(opened)
    assert [(s, e) for r, s, e in opened if r == 4] == [(4, 8), (20, 24)], "what is given is not opened"
    assert [(s, e) for r, s, e in opened if r == 3] == [(0, 4), (4, 8), (8, 9)]
    assert any(len(rows) > 1 and len(set(start)) > 1 for kind, rows, start, end in events if kind == "open")


@torch.no_grad()
def test_tokens_set_by_hand_and_branches():
    "A token of a finished block is changed, a place is opened again, a branch goes another way, in turns"

    def story(net):
        x, lengths = ragged_canvas()
        run = steps(net, x, Blocks(ConfTopK(), 4), M, 14, torch.arange(6), lengths, temperature=1.0)
        for _ in zip(range(7), run):
            pass
        run.set_token(0, 1, 3)
        other = run.branch(seed=torch.arange(6) + 100)
        run.set_token(1, 10, M)
        for _ in range(4):
            run.step()
            other.step()
        other.continue_with(steps=5)
        first, second = run.finish(), other.finish()
        run.set_token(3, 2, M)  # a row that had finished
        return first, second, run.finish()

    for a, b in zip(story(BlockCausalNet(cached=False)), story(BlockCausalNet(cached=True))):
        assert same(a, b)


@torch.no_grad()
def test_guidance_with_two_caches():
    x, lengths = ragged_canvas()
    results = []
    for cached in (False, True):
        net, weak = BlockCausalNet(cached), BlockCausalNet(cached, sharp=1.0, seed=1)
        how = dict(temperature=1.0, cfg_scale=1.5, unconditional=weak, lengths=lengths)
        results.append(sample(net, x, Blocks(ConfTopK(), 4), M, 20, **how))
    assert same(*results)


def test_a_denoiser_refuses_blocks_it_cannot_cache():
    x, lengths = ragged_canvas()
    with pytest.raises(ValueError, match="multiples of 4"):
        sample(BlockCausalNet(cached=True), x, Blocks(ConfTopK(), 6), M, lengths=lengths)

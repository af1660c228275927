"What a run keeps of its alternatives, if asked"

import pytest
import torch

from diffuspeech.diffusion import trajectory
from diffuspeech.diffusion.oracle import MarkovChain
from diffuspeech.diffusion.sample import sample

CHAIN = MarkovChain.random(vocab_size=12, seed=3)


@pytest.mark.parametrize("rule", ["conf_topk", "ancestral", "remdm_cap"])
def test_candidates_are_the_predictions(rule, tmp_path):
    "They change no token, hold what was committed, and survive the file"
    canvas, lengths = torch.full((2, 30), CHAIN.mask_id), torch.tensor([30, 20])
    options = dict(steps=8, lengths=lengths)
    plain = sample(CHAIN, canvas, rule, CHAIN.mask_id, **options)
    run = sample(CHAIN, canvas, rule, CHAIN.mask_id, candidates=4, **options).trajectory
    assert torch.equal(plain.tokens, run.final) and plain.trajectory.candidates is None
    assert run.candidates.tokens.shape == (run.steps, 2, 30, 4) and len(run.calls) == run.steps
    for row, n in enumerate(lengths.tolist()):
        step, place = run.commit_step[row, :n].long(), torch.arange(n)
        best = run.candidates.log_probs[step, row, place, 0].float().exp()
        assert torch.equal(run.candidates.tokens[step, row, place, 0].long(), run.final[row, :n])
        assert torch.allclose(best, run.confidence[row, :n], atol=2e-3)
    trajectory.save(run, tmp_path / "run.safetensors")
    again = trajectory.load(tmp_path / "run.safetensors").row(1)
    assert torch.equal(again.candidates.log_probs, run.candidates.log_probs[:, 1:])
    assert (again.candidates.log_probs[:, 0, 20:] == -torch.inf).all(), "nothing is asked behind the end"

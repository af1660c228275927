"""Small masked models with the interfaces of published ones, made of transformers' own layers

LLaDA, OmniVoice and MaskGCT bring their modelling code with their weights, which is not at hand in tests;
these have the same arguments, attributes and outputs, and differ in size."""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

V, MASK = 40, 39
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
FLAT = dict(rope_parameters=dict(rope_type="default", rope_theta=10_000.0), max_position_embeddings=64)


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**SIZE, vocab_size=V, max_position_embeddings=64))


def modernbert() -> nn.Module:
    special = dict(pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2)
    return ModernBertForMaskedLM(
        ModernBertConfig(**SIZE | dict(num_hidden_layers=4), **special, vocab_size=V, local_attention=4)
    )


def dream() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**SIZE, **FLAT, vocab_size=V, num_key_value_heads=2))


class LlamaBody(nn.Module):
    "Llama's layers, looking both ways"

    def __init__(self):
        super().__init__()
        self.layers = LlamaModel(LlamaConfig(**SIZE, **FLAT, vocab_size=V))

    def forward(self, embeddings, allowed=None):
        B, L = embeddings.shape[:2]
        allowed = torch.ones(B, 1, L, L, dtype=torch.bool) if allowed is None else allowed
        return self.layers(inputs_embeds=embeddings, attention_mask=allowed).last_hidden_state


class Llada(nn.Module):
    "LLaDA: no position ids, and an attention mask that its code does not read"

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=V, mask_token_id=MASK)
        self.model = LlamaBody()
        self.ff_out = nn.Linear(32, V, bias=False)

    def get_output_embeddings(self):
        return self.ff_out

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, attention_bias=None):
        hidden = self.model(self.model.layers.embed_tokens(input_ids))
        return CausalLMOutputWithPast(logits=self.ff_out(hidden))


class Mdlm(nn.Module):
    "MDLM: conditioned on noise, and its head takes the condition, too"

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=V, mask_token_id=MASK)
        self.model, self.sigma_map, self.linear = LlamaBody(), nn.Linear(1, 32), nn.Linear(32, V)

    def forward(self, input_ids, timesteps):
        c = self.sigma_map(timesteps[:, None].float())[:, None]
        return self.linear(self.model(self.model.layers.embed_tokens(input_ids)) * (1 + c))


class OmniVoice(nn.Module):
    "OmniVoice: text and audio in one sequence, Q codebooks out"

    def __init__(self, codebooks=3, audio_vocab_size=17):
        super().__init__()
        self.config = SimpleNamespace(
            num_audio_codebook=codebooks,
            audio_vocab_size=audio_vocab_size,
            audio_mask_id=audio_vocab_size - 1,
        )
        self.llm = LlamaBody()
        self.audio_embeddings = nn.Embedding(codebooks * audio_vocab_size, 32)
        self.audio_heads = nn.Linear(32, codebooks * audio_vocab_size, bias=False)

    def forward(self, input_ids, audio_mask, labels=None, attention_mask=None, position_ids=None):
        Q, size = self.config.num_audio_codebook, self.config.audio_vocab_size
        text = self.llm.layers.embed_tokens(input_ids[:, 0])
        shifted = input_ids * audio_mask[:, None] + size * torch.arange(Q)[:, None]
        x = torch.where(audio_mask[..., None], self.audio_embeddings(shifted).sum(1), text)
        logits = self.audio_heads(self.llm(x, attention_mask)).unflatten(-1, (Q, size))
        return SimpleNamespace(logits=logits.transpose(1, 2))


class DiffEstimator(nn.Module):
    "MaskGCT's backbone: a Llama with a condition for each position and a time"

    def __init__(self):
        super().__init__()
        self.body, self.time = LlamaBody(), nn.Linear(1, 32)

    def forward(self, x, diffusion_step, cond, x_mask):
        x = x + cond + self.time(diffusion_step[:, None].float())[:, None]
        same = torch.eye(x.shape[1], dtype=torch.bool)
        return self.body(x, x_mask.bool()[:, None, None] | same)


class MaskGCT(nn.Module):
    "MaskGCT's second stage: an embedding and a head for each codebook"

    def __init__(self, num_quantizer=3, codebook_size=16):
        super().__init__()
        self.num_quantizer, self.codebook_size = num_quantizer, codebook_size
        self.layer_emb, self.mask_emb = nn.Embedding(num_quantizer, 32), nn.Embedding(1, 32)
        self.token_emb = nn.ModuleList(nn.Embedding(codebook_size, 32) for _ in range(num_quantizer))
        self.to_logits = nn.ModuleList(nn.Linear(32, codebook_size) for _ in range(num_quantizer))
        self.cond_emb, self.diff_estimator = nn.Embedding(16, 32), DiffEstimator()

"A prepared corpus of a few clips of the pack, and a tokenizer and a recogniser with random weights"

from dataclasses import replace
from importlib.resources import files

import torch

from diffuspeech.asr.canary import Canary, CanaryConfig
from diffuspeech.data.audio import import_torchaudio
from diffuspeech.data.manifest import Manifest, write_manifest
from diffuspeech.tokenizers.s3 import Tokenizer, TokenizerConfig
from diffuspeech.voice import prepared


def prepare_clips(folder, vocoder="world", **splits):
    "prepare_clips(folder, train=12, dev=2): the first so many clips in each split, under other names, since a test clip would be refused"
    clips = [
        replace(u, id=f"c{k}", split="train")
        for k, u in enumerate(Manifest(files("diffuspeech") / "assets" / "pack" / "pack.jsonl"))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in splits.items():
        write_manifest(folder / f"{split}.jsonl", clips[:n])
        prepared.prepare_corpus(folder / f"{split}.jsonl", speed_copies=0, vocoder=vocoder, workers=1)
    return clips[: max(splits.values())]


def save_random_models(folder):
    "folder/tokenizer and folder/recogniser, as small as they come"
    torch.manual_seed(0)
    Tokenizer(
        TokenizerConfig(hidden=32, encoder_layers=1, ctc_layers=1, heads=2, ffn_dim=32, channels=8)
    ).save_pretrained(folder / "tokenizer")
    Canary(
        CanaryConfig(
            hidden=32,
            layers=2,
            heads=2,
            ffn_dim=32,
            channels=4,
            n_mels=40,
            decoder_hidden=32,
            decoder_layers=1,
            decoder_heads=2,
            decoder_ffn_dim=32,
            dropout=0.0,
        )
    ).save_pretrained(folder / "recogniser")


def random_hifigan(channels=16):
    "A SpeechT5HifiGan of 160 samples to a frame, as narrow as it comes"
    import_torchaudio()
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    torch.manual_seed(0)
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            upsample_initial_channel=channels,
            upsample_rates=[5, 4, 4, 2],
            upsample_kernel_sizes=[11, 8, 8, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
            initializer_range=0.2,
        )
    )

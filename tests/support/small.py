"A prepared corpus of a few clips of the pack, and a tokenizer and a recogniser with random weights"

from dataclasses import replace
from importlib.resources import files

import tokenizers as hf
import torch

from diffuspeech.asr.canary import Canary, CanaryConfig
from diffuspeech.asr.recognizer import load_asr
from diffuspeech.data.audio import import_torchaudio
from diffuspeech.data.manifest import Manifest, write_manifest
from diffuspeech.tokenizers.s3 import Tokenizer, TokenizerConfig
from diffuspeech.tokenizers.s3_whisper import S3Whisper, S3WhisperConfig
from diffuspeech.voice import prepared


def prepare_clips(folder, vocoder="world", **splits):
    "prepare_clips(folder, train=12, dev=2): clips for each split, renamed, since test clips are refused"
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
    "folder/tokenizer, folder/recogniser (a Whisper) and folder/canary, as small as they come"
    torch.manual_seed(0)
    Tokenizer(
        TokenizerConfig(hidden=32, encoder_layers=1, ctc_layers=1, heads=2, ffn_dim=32, channels=8)
    ).save_pretrained(folder / "tokenizer")
    save_random_whisper(folder / "recogniser")
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
    ).save_pretrained(folder / "canary")


def save_random_s3_whisper(folder, whisper, frame_rate=50):
    "Speech tokens with random weights on top of the first layer of a Whisper in a folder"
    torch.manual_seed(0)
    config = S3WhisperConfig(
        str(whisper),
        load_asr(whisper).fingerprint(),
        layer=1,
        state_dim=32,
        frame_rate=frame_rate,
        hidden=16,
        encoder_layers=1,
        ctc_layers=1,
        heads=2,
        ffn_dim=16,
    )
    S3Whisper(config).save_pretrained(folder)
    return folder


def save_random_whisper(folder, seed=0):
    "A Whisper of two layers with random weights, as a folder of the hub; subwords are letters and pairs"
    import_torchaudio()
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    names = ("endoftext", "startoftranscript", "notimestamps")
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" please leave your message after the tone"] * 2, trainer)
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names])
    size = tokenizer.get_vocab_size()
    torch.manual_seed(seed)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
    ids = dict(pad_token_id=size - 3, bos_token_id=size - 3, eos_token_id=size - 3)
    config = WhisperConfig(
        vocab_size=size,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        decoder_start_token_id=size - 2,
        **heads,
        **ids,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config.suppress_tokens = None
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


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

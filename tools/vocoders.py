"""Vocoders side by side on clean clips of dev, each from its own features of the recording: python tools/vocoders.py [a trained vocoder's folder ...]"""

import sys
from types import SimpleNamespace

from diffuspeech.base.pretrained import home
from diffuspeech.cli import print_table
from diffuspeech.data.manifest import Manifest
from diffuspeech.evaluate.speech import speech_table
from diffuspeech.voice.vocoder import HifiGan, World

clips = [
    u
    for u in Manifest(home() / "corpora" / "small" / "dev.jsonl")
    if u.extra["condition"] == "clean" and 1.5 < u.duration < 6
][:80]
rows = []
for vocoder in (*(World(n).precise for n in (24, 40, 60)), *map(HifiGan, sys.argv[1:])):
    table = speech_table(SimpleNamespace(vocoder=vocoder), clips, ("Original", "Vocoder"), mos_clips=80)
    rows += [
        dict(vocoder=repr(vocoder) if isinstance(vocoder, World) else vocoder.name) | row
        for row in table
        if row["system"] == "Vocoder" or not rows
    ]
keep = (
    "vocoder",
    "system",
    "voices",
    "clips",
    "words",
    "wer",
    "wer_low",
    "wer_high",
    "distillmos",
    "distillmos_low",
    "distillmos_high",
    "spksim",
    "rtf",
)
print_table([{k: row[k] for k in keep} for row in rows])

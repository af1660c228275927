"""The table in nbs/voice/vocoder: vocoders on clean clips of dev, each from its features of the recording.

python tools/vocoders.py [folder of a trained vocoder ...]
"""

import sys
from types import SimpleNamespace

from diffuspeech.base.pretrained import home
from diffuspeech.cli.output import print_table
from diffuspeech.data.manifest import Manifest
from diffuspeech.evaluate.speech import speech_table
from diffuspeech.evaluate.systems import CodecOracle, Recording
from diffuspeech.voice.vocoder import Vocoder, World, load_vocoder

COLUMNS = "vocoder system voices clips words wer wer_low wer_high distillmos"
COLUMNS += " distillmos_low distillmos_high spksim rtf"


def rows(vocoder: Vocoder, clips: list) -> list[dict]:
    "The recordings, and what the vocoder makes of their features"
    name = repr(vocoder) if isinstance(vocoder, World) else vocoder.name
    systems = [Recording(), CodecOracle(SimpleNamespace(vocoder=vocoder), name="Vocoder", source="features")]
    return [dict(vocoder=name) | row for row in speech_table(systems, clips, mos_clips=len(clips))]


def main():
    manifest = Manifest(home() / "corpora" / "small" / "dev.jsonl")
    clips = [u for u in manifest if u.extra["condition"] == "clean" and 1.5 < u.duration < 6][:80]
    found = []
    for vocoder in (*(World(n).precise for n in (24, 40, 60)), *map(load_vocoder, sys.argv[1:])):
        found += [row for row in rows(vocoder, clips) if row["system"] == "Vocoder" or not found]
    print_table([{column: row[column] for column in COLUMNS.split()} for row in found])


if __name__ == "__main__":
    main()

"A prepared corpus of a few clips of the pack"
from dataclasses import replace
from importlib.resources import files

from diffuspeech.speech.manifest import Manifest, write_manifest
from diffuspeech.speech.prepared import prepare


def prepared(folder, **splits):
    "prepared(folder, train=12, dev=2): the first so many clips in each split, under other names, since a test clip would be refused"
    clips = [replace(u, id=f"c{k}") for k, u in enumerate(Manifest(files("diffuspeech") / "assets" / "pack" / "pack.jsonl"))]
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in splits.items():
        write_manifest(folder / f"{split}.jsonl", clips[:n])
        prepare(folder / f"{split}.jsonl", twins=0, workers=1)
    return clips[: max(splits.values())]

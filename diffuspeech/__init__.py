"""The workbench for discrete diffusion over speech tokens

    import diffuspeech as ds

    reconstructor = ds.Reconstructor.from_pretrained()       # the built-in model
    denoiser = ds.wrap(model, "llada")                       # or your own
    out = ds.sample(denoiser, canvas, "low_confidence", mask_id, steps=32)

The names below are imported when they are first used; everything else stands in the parts, such as
`diffuspeech.diffusion` or `diffuspeech.evaluate`. `ds.samplers()` lists what `sample` can be asked for."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .asr.recognizer import load_asr as load_asr
    from .diffusion.catalogue import samplers as samplers
    from .diffusion.denoiser import Denoiser as Denoiser
    from .diffusion.sample import sample as sample
    from .diffusion.sample import steps as steps
    from .diffusion.trajectory import Generation as Generation
    from .diffusion.trajectory import Trajectory as Trajectory
    from .diffusion.wrap import wrap as wrap
    from .models.reconstructor import Reconstructor as Reconstructor
    from .tokenizers.public import load_tokenizer as load_tokenizer
    from .train.loop import train_preset as train_preset
    from .voice.jobs import load_codec as load_codec
    from .workbench.player import player as player

# The module that each name is in. What trains is `train_preset`, since `diffuspeech.train` is a part.
_MODULES = {
    "Denoiser": "diffusion.denoiser",
    "Generation": "diffusion.trajectory",
    "Reconstructor": "models.reconstructor",
    "Trajectory": "diffusion.trajectory",
    "load_asr": "asr.recognizer",
    "load_codec": "voice.jobs",
    "load_tokenizer": "tokenizers.public",
    "player": "workbench.player",
    "sample": "diffusion.sample",
    "samplers": "diffusion.catalogue",
    "steps": "diffusion.sample",
    "train_preset": "train.loop",
    "wrap": "diffusion.wrap",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'diffuspeech' has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    if not isinstance(value, type):
        from .base.help import document_options

        document_options(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def _player_of(run) -> dict | tuple[dict, dict] | None:
    from .workbench.player import player

    return player(run)._repr_mimebundle_() if getattr(run, "generation", run).trajectory else None


def _show_runs_in_notebooks() -> None:
    "In a notebook, what sampling gives shows itself in the player; nothing is imported before that"
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        show = shell.display_formatter.mimebundle_formatter.for_type_by_name
        show("diffuspeech.diffusion.trajectory", "Generation", _player_of)
        show("diffuspeech.models.reconstructor", "SpeechResult", _player_of)


_show_runs_in_notebooks()

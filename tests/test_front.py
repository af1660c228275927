"What `import diffuspeech as ds` gives, and when"

import inspect
import json
import pydoc
import subprocess
import sys

import pytest

import diffuspeech as ds

NAMES = [name for name in ds.__all__ if name != "__version__"]


def test_import_alone_is_light():
    "No torch, no transformers; and the names are there before they are loaded"
    code = (
        "import sys, json, diffuspeech as ds;"
        "print(json.dumps([sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)), dir(ds)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, names = json.loads(done.stdout)
    assert loaded == [] and set(NAMES) <= set(names)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_its_module_defines(name):
    value = getattr(ds, name)
    assert value.__module__ == f"diffuspeech.{ds._MODULES[name]}" and value.__name__ == name
    assert getattr(ds, name) is value


def test_type_checkers_see_the_same_names():
    source = inspect.getsource(ds)
    for name, module in ds._MODULES.items():
        assert f"from .{module} import {name} as {name}\n" in source


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        ds.sampel
    assert not hasattr(ds, "nothing")


@pytest.mark.parametrize("name", ["sample", "steps", "wrap", "load_codec", "load_tokenizer", "train_preset"])
def test_help_has_a_line_for_every_option(name):
    function = getattr(ds, name)
    shown = pydoc.plain(pydoc.render_doc(function))
    for option, parameter in inspect.signature(function).parameters.items():
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        line = next(
            (text.strip() for text in shown.splitlines() if text.strip().startswith(option + default)), None
        )
        assert line and len(line) > len(option + default) + 4, f"{option}: {line!r}"


def test_samplers_lists_every_rule():
    from diffuspeech.diffusion.catalogue import CATALOGUE

    assert list(ds.samplers()) == list(CATALOGUE) and all(ds.samplers().values())

"The faster Kokoro says what ONNX Runtime's says"

import sys
from pathlib import Path

import numpy as np
import pytest

from diffuspeech.data import voices

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


@pytest.mark.needs("kokoro")
def test_waves_are_those_of_onnx_runtime(monkeypatch):
    pytest.importorskip("onnx", reason="onnx: pip install onnx")
    session = voices.kokoro_session
    monkeypatch.setattr(voices, "kokoro_session", session)  # put back at the end
    import fast_kokoro

    for voice, text in (
        ("af_nova", "Please hold the line."),
        ("bm_lewis", "The second floor is closed today."),
    ):
        voices.kokoro_session = session
        expected = voices.kokoro((voice,), text).numpy()
        voices.kokoro_session = fast_kokoro.cache(fast_kokoro.Kokoro)
        found = voices.kokoro((voice,), text).numpy()
        assert len(found) == len(expected)
        error = np.square(found - expected).sum() / np.square(expected).sum()
        assert error < 0.03, f"{-10 * np.log10(error):.1f} dB; usually 20 and more"

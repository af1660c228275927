"Small files like those that CosyVoice publishes"

import torch

from diffuspeech.voice.cosyvoice_flow import CosyFlowConfig
from diffuspeech.voice.hift import HiftConfig

FLOW = CosyFlowConfig(
    vocab_size=64,
    dim=32,
    heads=4,
    ffn_dim=64,
    layers=2,
    channels=(32, 32),
    num_blocks=1,
    num_mid_blocks=1,
    estimator_heads=2,
    head_dim=16,
)


HIFT = HiftConfig(base_channels=32, f0_channels=16)


def message(number, *parts):
    "A field of a protocol buffer: bytes, or a number"

    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    body = b"".join(
        part.encode() if isinstance(part, str) else part for part in parts if not isinstance(part, int)
    )
    return (
        varint(number << 3) + varint(parts[0])
        if isinstance(parts[0], int)
        else varint(number << 3 | 2) + varint(len(body)) + body
    )


def small_campplus(path, numbers=192):
    "An ONNX model with the inputs and outputs of CAM++: the largest value of each band, through a matrix"
    weights = torch.randn(80, numbers, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    axes = message(5, message(1, "axes"), message(8, 1), message(20, 7))
    nodes = message(
        1,
        message(1, "x"),
        message(2, "m"),
        message(4, "ReduceMax"),
        axes,
        message(5, message(1, "keepdims"), message(3, 0), message(20, 2)),
    )
    nodes += message(1, message(1, "m"), message(1, "w"), message(2, "y"), message(4, "MatMul"))
    tensor = message(
        5, message(1, 80), message(1, numbers), message(2, 1), message(8, "w"), message(9, weights)
    )

    def value(number, name, *sizes):
        dims = [message(1, message(1, s) if isinstance(s, int) else message(2, s)) for s in sizes]
        return message(number, message(1, name), message(2, message(1, message(1, 1), message(2, *dims))))

    graph = message(7, nodes, message(2, "g"), tensor, value(11, "x", 1, "T", 80), value(12, "y", 1, numbers))
    path.write_bytes(message(1, 8) + message(8, message(2, 13)) + graph)
    return path

"""Build the corpus with a faster Kokoro: python tools/fast_kokoro.py corpus build small

Any command of `diffuspeech` may follow. On a processor with VNNI the voice takes 0.45 of ONNX Runtime's time.
Most of it goes into the 48 convolutions of the two last stages: they run in oneDNN, as int8 as before,
and what stands between them is compiled into one loop. The waves are those of ONNX Runtime but for rounding
(about 21 dB). It needs `pip install onnx`, which cuts the network, and a C++ compiler.
"""

import os
import sys
from functools import cache
from io import BytesIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffuspeech.base.files import atomic_write
from diffuspeech.base.pretrained import home, local_folder
from diffuspeech.data import voices

GENERATOR = "/decoder/decoder/generator/"
STYLE = "/decoder/Slice_output_0"
FIRST = [GENERATOR + name for name in ("noise_convs.0/Conv_output_0", "noise_convs.1/Conv_output_0")]
FIRST += [GENERATOR + "ups.0/ConvTranspose_output_0", STYLE]  # what the first part gives
LAST = GENERATOR + "Div_4_output_0"  # what the last part takes
DILATIONS = 1, 3, 5


# ---- the network in three parts


def cut(model, outputs: list[str], inputs: list[str] | None = None) -> bytes:
    "The part of an ONNX network between some of its tensors"
    import onnx

    part, float_ = onnx.ModelProto.FromString(model.SerializeToString()), onnx.TensorProto.FLOAT
    g, ends = part.graph, set(inputs or ())
    needed, kept = set(outputs), []
    for node in reversed(list(g.node)):
        if any(o in needed - ends for o in node.output):
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            needed |= set(node.input)
    weights = [onnx.TensorProto.FromString(t.SerializeToString()) for t in g.initializer if t.name in needed]
    for field, new in ((g.node, kept[::-1]), (g.initializer, weights), (g.value_info, [])):
        del field[:]
        field.extend(new)
    for field, names in ((g.output, outputs), (g.input, inputs)):
        if names is not None:
            del field[:]
            field.extend(onnx.helper.make_tensor_value_info(name, float_, None) for name in names)
    return part.SerializeToString()


def middle_weights(model) -> dict[str, np.ndarray]:
    "Weights of the residual blocks: of a convolution .w, .zero, .scale and .bias, of a norm .fc and .fc_bias"
    from onnx import numpy_helper

    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    made_by, found = {o: n for n in model.graph.node for o in n.output}, {}
    for node in model.graph.node:
        name = node.name.removeprefix(GENERATOR)
        if node.name == name or not name.startswith(("resblocks", "noise_res")):
            continue
        if node.op_type == "ConvInteger":
            key = name.removesuffix("/Conv_quant").replace("/", ".")
            bias = "decoder.decoder.generator." + key + ".bias"
            (scale,) = (i for i in made_by[bias + "_scale"].input if i in values)
            found |= {f"{key}.w": values[node.input[1]], f"{key}.zero": values[node.input[3]]}
            found |= {f"{key}.scale": values[scale], f"{key}.bias": values[bias]}
        elif node.op_type == "MatMulInteger":
            key = name.removesuffix("/fc/Gemm_MatMul_quant").replace("/", ".")
            layer, (_, weight, _, zero) = "decoder.decoder.generator." + key + ".fc.", node.input
            whole = values[weight].astype(np.float32) - values[zero].astype(np.float32)
            found |= {
                f"{key}.fc": whole * values[layer + "weight_scale"],
                f"{key}.fc_bias": values[layer + "bias"],
            }
    found |= {k.removeprefix("decoder.decoder.generator."): v for k, v in values.items() if ".alpha" in k}
    return found | {
        "up": values[GENERATOR + "Mul_1_output_0"],
        "up_bias": values["decoder.decoder.generator.ups.1.bias"],
    }


def make_parts():
    "Cut the network once; the parts are kept beside the corpora"
    folder = home() / "fast-kokoro"
    if not (folder / "middle.npz").exists():
        import onnx

        model = onnx.load(local_folder("kokoro") / "part.bin")
        end = [output.name for output in model.graph.output]
        for name, data in (("first", cut(model, FIRST)), ("last", cut(model, end, [LAST]))):
            atomic_write(folder / f"{name}.onnx", lambda path, data=data: path.write_bytes(data))
        memory = BytesIO()
        np.savez(memory, **middle_weights(model))
        atomic_write(folder / "middle.npz", lambda path: path.write_bytes(memory.getvalue()))
    return folder


# ---- the middle, in torch


@torch.compile(dynamic=True)
def norm_snake(x: Tensor, gamma: Tensor, beta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    "Adaptive instance norm and the Snake activation; and the least and the greatest value"
    mean = x.mean(-1, keepdim=True)
    spread = torch.sqrt((x - mean).square().mean(-1, keepdim=True) + 1e-5)
    y = (x - mean) * ((1 + gamma) / spread) + beta
    y = y + torch.sin(alpha * y).square() / alpha
    return y, *torch.aminmax(y)


@torch.compile(dynamic=True)
def add_norm_snake(x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, alpha: Tensor):
    x = x + residual
    return x, *norm_snake(x, gamma, beta, alpha)


@torch.compile(dynamic=True)
def mean_of_sums(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum(x + residual for x, residual in pairs) / len(pairs)


@torch.compile(dynamic=True)
def quantize(y: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (torch.round(y / scale) + zero).clamp(0, 255).to(torch.uint8)


class Convolution:
    "ONNX Runtime's DynamicQuantizeLinear and ConvInteger"

    def __init__(self, weights: dict[str, np.ndarray], name: str, dilation: int):
        whole = weights[name + ".w"].astype(np.int16) - int(weights[name + ".zero"])
        w = torch.from_numpy(whole.astype(np.int8))
        self.scales = torch.full((len(w),), float(weights[name + ".scale"]))
        self.zeros, self.bias = torch.zeros(len(w)).long(), torch.from_numpy(weights[name + ".bias"])
        self.shape = [1], [(w.shape[2] - 1) * dilation // 2], [dilation], 1
        self.weight = torch.ops.onednn.qconv_prepack(
            w, self.scales, 0.02, 128, *self.shape, [1, w.shape[1], 4000]
        )

    def __call__(self, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
        low, high = min(0.0, low.item()), max(0.0, high.item())
        scale = (high - low) / 255
        zero = round(min(max(-low / scale, 0), 255))
        x = quantize(y, torch.tensor(scale), torch.tensor(float(zero)))
        out = 1.0, 0, torch.float32, "none", [], ""
        return torch.ops.onednn.qconv_pointwise(
            x, scale, zero, self.weight, self.scales, self.zeros, self.bias, *self.shape, *out
        )


class Block:
    "A residual block; its last sum is left to the caller"

    def __init__(self, weights: dict[str, np.ndarray], name: str):
        self.layers = []
        for i, dilation in enumerate(DILATIONS):
            for half, by in ((1, dilation), (2, 1)):
                norm = f"{name}.adain{half}.{i}.fc"
                fc, bias, alpha = (weights[k] for k in (norm, norm + "_bias", f"{name}.alpha{half}.{i}"))
                convolution = Convolution(weights, f"{name}.convs{half}.{i}", by)
                self.layers.append((*map(torch.from_numpy, (fc, bias, alpha)), convolution))

    def __call__(self, x: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        y = residual = None
        for i, (fc, bias, alpha, convolution) in enumerate(self.layers):
            gamma, beta = (style @ fc + bias)[..., None].chunk(2, 1)
            if i % 2:
                residual = convolution(*norm_snake(y, gamma, beta, alpha))
            elif i:
                x, *normed = add_norm_snake(x, residual, gamma, beta, alpha)
                y = convolution(*normed)
            else:
                y = convolution(*norm_snake(x, gamma, beta, alpha))
        return x, residual


class Kokoro:
    "In place of an `onnxruntime.InferenceSession`"

    def __init__(self, threads: int = 1):
        import onnxruntime

        folder, options = make_parts(), onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.first, self.last = (
            onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in ("first", "last")
        )
        with np.load(folder / "middle.npz") as file:
            weights = dict(file)
        self.noise = [Block(weights, f"noise_res.{i}") for i in range(2)]
        self.blocks = [Block(weights, f"resblocks.{i}") for i in range(6)]
        self.up = torch.from_numpy(weights["up"]), torch.from_numpy(weights["up_bias"])

    @torch.no_grad()
    def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        noise_0, noise_1, x, style = map(torch.from_numpy, self.first.run(names, inputs))
        x = x + sum(self.noise[0](noise_0, style))
        x = mean_of_sums([block(x, style) for block in self.blocks[:3]])
        x = F.conv_transpose1d(F.leaky_relu(x, 0.1), *self.up, stride=6, padding=3)
        x = F.pad(x, (1, 0), mode="reflect") + sum(self.noise[1](noise_1, style))
        x = mean_of_sums([block(x, style) for block in self.blocks[3:]])
        return self.last.run(names, {LAST: x.numpy()})


voices.kokoro_session = cache(Kokoro)  # in worker processes, too: they read this file again

if __name__ == "__main__":
    from diffuspeech import cli

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the worker processes
    make_parts()
    sys.exit(cli.main())

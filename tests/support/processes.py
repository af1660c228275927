"What test_processes.py starts, in one or several processes: a short training that writes down what it masks"

import hashlib
import json
import os
import sys
from pathlib import Path

import accelerate
import torch
from torch.distributed.fsdp import FSDPModule

from diffuspeech.tasks import decoder
from diffuspeech.train.config import TrainConfig
from diffuspeech.train.loop import train

SHAPE = dict(dim=48, ffn_dim=64, embedding_dim=32)


class CpuFsdpAccelerator(accelerate.Accelerator):
    "Shards weights as Accelerate does over GPUs; the same code runs on processors, with gloo between them"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.state.distributed_type = accelerate.DistributedType.FSDP
        self.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin()  # as the environment says
        if self.mixed_precision != "no":
            self.state.fsdp_plugin.set_mixed_precision(self.mixed_precision)

    def prepare(self, *args):
        step, optimizer = super().prepare(*args)
        assert isinstance(step, FSDPModule)
        return step, optimizer


def main(place: Path, corpus: Path, **changes):
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"masked-{os.environ.get('RANK', 0)}.jsonl"
    real, rows = decoder.corrupt, []

    def corrupt(tokens, row_keys, mask, t, lengths, **kwargs):
        found = real(tokens, row_keys, mask, t, lengths, **kwargs)
        rows.extend(
            (key, hashlib.sha256(x[:n].numpy().tobytes()).hexdigest())
            for key, x, n in zip(row_keys.tolist(), found.x_t, lengths.tolist())
        )
        return found

    decoder.corrupt = corrupt
    if "ACCELERATE_USE_FSDP" in os.environ:
        accelerate.Accelerator = CpuFsdpAccelerator
    run = TrainConfig(
        "diffuspeech.tasks.decoder:DecoderTask",
        str(corpus),
        SHAPE,
        dict(
            tokenizer=f"{corpus}/tokenizer",
            recogniser=f"{corpus}/recogniser",
            taste=dict(quantizer=dict(kind="fsq", layers=2)),
        ),
        **dict(
            steps=6,
            lr=3e-3,
            warmup_steps=2,
            ema_decay=0.9,
            precision="fp32",
            batch_seconds=12.0,
            batches_per_update=2,
            validate_every=100,
            save_every=100,
        )
        | changes,
    )
    train(run, place, "cpu", progress_bar=False)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))

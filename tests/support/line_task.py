"A task that learns y = 3x in seconds, with a sample to be heard: what the launch tests train"

import time
from dataclasses import dataclass

import torch
from torch import nn

from diffuspeech.base.checkpoint import PretrainedModel
from diffuspeech.train.task import Task


@dataclass(frozen=True)
class LineConfig:
    width: int = 1


class Line(PretrainedModel):
    Config = LineConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(config.width, 1)


class LineTask(Task):
    Config = LineConfig

    def __init__(self, run):
        self.run, self.model = run, Line(LineConfig(**run.model))

    def batches(self, epoch):
        return [torch.randn(16, 1, generator=torch.Generator().manual_seed(i)) for i in range(10)]

    def loss(self, batch, update):
        time.sleep(0.05)
        return {"loss": update.share(((self.model.layer(batch) - 3 * batch) ** 2).sum())}

    def validate(self, model):
        return {"score": (model.layer.weight - 3).abs().item()}

    def samples(self, model):
        return {"tone": torch.sin(torch.arange(16_000) * 0.1 * model.layer.weight.item()) / 2}

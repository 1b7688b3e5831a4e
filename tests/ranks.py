"""One of several processes, started by test_distributed: runs scripts one after the other, each in a new group of processes."""

import json
import os
import sys
from pathlib import Path

import utils

import timm.layers
import torch
from conftest import script
from torch import nn

NORMS = {"plain": lambda: nn.BatchNorm2d(6), "with activation": lambda: timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU)}


def keep_first_epoch():
    """Let train.py leave a copy of last.pt as it was after the first epoch: epoch1.pt. Returns what saved checkpoints."""
    save = utils.save_checkpoint

    def keeping(path, value):
        save(path, value)
        if path.name == "last.pt" and value["epoch"] == 1:
            save(path.with_name("epoch1.pt"), value)

    utils.save_checkpoint = keeping
    return save


def pass_through(norm, rows):
    """Output, gradients and running statistics of a batch norm on `rows` of 7 images whose mean is far from 0."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 7, 6, 5, 5, generator=generator)
    x = (3 * x + 20)[rows].contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 6))
        norm.bias.copy_(torch.linspace(-1, 1, 6))
    y = norm(x)
    y.backward(grad[rows])
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def batch_norms(folder):
    """Two images here, five there: leave what the joint norms give."""
    from models import join_batch_norm

    device = torch.device("cpu")
    with utils.processes(device):
        rank = utils.rank_and_world()[0]
        for name, make in NORMS.items():
            norm = nn.Sequential(make())
            join_batch_norm(norm, device)
            torch.save(pass_through(norm[0], [slice(0, 2), slice(2, 7)][rank]), Path(folder) / f"{name}.{rank}.pt")


if __name__ == "__main__":
    keep_first_epoch()
    for port, command in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        if command[0] == "batch norms":
            batch_norms(command[1])
        else:
            script(*command)

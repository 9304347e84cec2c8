# SPDX-License-Identifier: Apache-2.0
"""A look at a run that leaves no trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tutelage.core import Live
from tutelage.run.assemble import Assembled


@contextmanager
def untouched(made: Assembled) -> Iterator[None]:
    """Put back, after whatever is done inside, all that a step changes: the run goes on to the same bits.

    That is the parameters, buffers, gradients, flags and clock of the Distiller, the buffers of its teachers (and
    the parameters of those that follow the student), what feeders remember, the scale of fp16, and the random
    generators.
    """
    distiller = made.distiller
    modules: list[nn.Module] = [*distiller.modules()]
    parameters = [*distiller.parameters()]
    for teacher in distiller.teachers.values():
        for network in teacher.networks():
            modules += network.modules()
            if not isinstance(teacher, Live):
                parameters += network.parameters()
    values = [parameter.detach().clone() for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    flags = [module.training for module in modules]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
    ]
    step = distiller.step
    remembered = [{name: tensor.clone() for name, tensor in one.state().items()} for one in distiller.feeders]
    scaler = made.runtime.scaler
    scale = scaler.state_dict() if scaler is not None else None
    devices = [made.runtime.device] if made.runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value, gradient in zip(parameters, values, gradients, strict=True):
                    parameter.copy_(value)
                    parameter.grad = gradient
                for module, name, buffer, before in buffers:
                    module._buffers[name] = None if buffer is None or before is None else buffer.copy_(before)
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag
            distiller.step = step
            for feeder, state in zip(distiller.feeders, remembered, strict=True):
                feeder.load(state)
            if scaler is not None and scale is not None:
                scaler.load_state_dict(scale)

"""Comparison of a traced plan with its network, in float64."""

import torch
from torch import nn

from edgeft.quant.plan import Plan
from edgeft.quant.rescale import fold_pooling
from edgeft.quant.tracing.trace import trace
from tests.nets import SIZE, randomise, run_plan


def assert_same_function(net: nn.Module, size: int = SIZE, tolerance: float = 1e-9) -> Plan:
    """Trace a network, with random weights and statistics, and compare logits and shapes; the plan reads normalised images."""
    net = randomise(net).double()
    x = torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plan = trace(net, (3, size, size))
    with torch.no_grad():
        wanted = net(x.clone())
        fold_pooling(plan)
        env = run_plan(plan, x)
    assert wanted.std() > 0.1, "nothing to compare"
    torch.testing.assert_close(env[plan.output], wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    for step in plan.steps:
        assert tuple(env[step.name].shape[1:]) == step.shape, step.name
    return plan

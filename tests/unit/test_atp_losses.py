"""ATP-LLaVA's losses, and that thresholds learn to meet a budget."""

import pytest
import torch
from helpers_atp import GRID, Sample, prompts
from helpers_golden import assert_close
from torch import Tensor

from vtok.errors import ConfigError
from vtok.methods.atp.losses import atp_loss, token_counts
from vtok.methods.atp.modules import ATPModules
from vtok.methods.atp.spec import INPUTS, ATPSpec


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_budget_is_learned(inputs: str) -> None:
    """The target loss alone moves every parameter and brings the average of soft counts to the target; hard counts follow."""
    torch.manual_seed(0)
    made = ATPModules(ATPSpec(depth=3, width=12, grid=GRID, layers=(1, 2), hidden=8, inputs=inputs)).double()
    for parameter in made.parameters():  # untrained thresholds
        assert parameter.abs().sum() > 0 or parameter.shape[0] == 1
    p = prompts([Sample(2, True, 3)] * 6, 21)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    target, total = 7.0, p.slots.image.sum(-1)

    def run(temperature: float) -> tuple[list[Tensor], list[Tensor]]:
        slots, gate, soft, hard = p.slots, None, [], []
        for layer in (1, 2):
            scores = made.scores(p.attention(gate), slots)
            decision = made(layer, *scores, slots, gate, temperature)
            slots, gate = slots._replace(alive=decision.keep), decision.gate
            soft.append(token_counts(decision.gate, p.slots))
            hard.append(token_counts(decision.keep, p.slots))
        return soft, hard

    for step in range(80):
        counts = torch.stack(run(10.0 + step)[0], -1)
        loss = atp_loss(counts, (1, 2), total, 3, target, lambda_atp=0.0)
        optimizer.zero_grad()
        loss.extra.backward()
        optimizer.step()
        if step == 0:
            assert abs(loss.average.item() - target) > 0.5
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in made.parameters())
    with torch.no_grad():
        soft, hard = (torch.stack(counts, -1).double() for counts in run(90.0))
    for counts, tolerance in ((soft, 0.4), (hard, 0.6)):
        assert atp_loss(counts, (1, 2), total, 3, target).average.item() == pytest.approx(target, abs=tolerance)


def test_samples_without_an_image_do_not_count() -> None:
    counts = torch.tensor([[6.0, 3.0], [0.0, 0.0], [2.0, 1.0]])
    total = torch.tensor([12, 0, 12])
    found, expected = atp_loss(counts, (1, 2), total, 3, 5), atp_loss(counts[::2], (1, 2), 12, 3, 5)
    for one, other in zip(found, expected):
        assert_close(one, other, 1e-6)
    nothing = atp_loss(counts[1:2], (1, 2), total[1:2], 3, 5)
    assert nothing.extra == nothing.target == nothing.depth == 0


def test_the_target_is_an_average_of_the_batch() -> None:
    """9 and 1 tokens miss a target of 5 by nothing; each sample alone by 4."""
    counts = torch.tensor([[9.0], [1.0]], requires_grad=True)
    loss = atp_loss(counts, (0,), 12, 2, 5, normalise=False)
    assert loss.average == 5 and loss.target == 0
    above = atp_loss(counts, (0,), 12, 2, 4, lambda_atp=0.0, normalise=False)
    assert torch.autograd.grad(above.extra, counts)[0].flatten().tolist() == pytest.approx([0.1, 0.1])
    with pytest.raises(ConfigError, match="over must be one of layers, modules, got 'layer'"):
        atp_loss(counts, (0,), 12, 2, 5, over="layer")

"""What methods that look at the vision tower choose, by their definitions."""

import pytest
import torch
from helpers_features import Chosen, encoded
from vlm_zoo import MaskOracle, assert_same, build, generate, inputs, tower_probs

import vtok
from vtok.patches.hf_vlm.families import find


def _hidden(name, values):
    """[V, N, C]: what leaves the last block of the unpatched tower, and the connector."""
    model = build(name, "eager")
    (vlm,) = find(model)
    with torch.no_grad():
        out = vlm.module.vision_tower(values["pixel_values"], output_hidden_states=True)
    return out.hidden_states[-1], vlm.module.multi_modal_projector


# Each method by its definition, from the unpatched tower's own attention and hidden states.
@pytest.mark.parametrize("preset", [None, "official"])
def test_visionzip_by_hand(preset):
    """LLaVA-1.5: class token, dominant tokens, contextual tokens merged in front of the connector."""
    name, values = "LLaVA-1.5", inputs("LLaVA-1.5")
    config = vtok.VisionZip(dominant=5, contextual=3, preset=preset)
    chosen = Chosen(build(name), values, config)
    probs = tower_probs(name, values)["image"][1]
    hidden, connector = _hidden(name, values)
    eager = build(name, "eager").model.vision_tower.encoder.layers[1].self_attn
    for i in range(3):
        order = sorted(range(16), key=lambda j: (-float(probs[i, :, 0, 1 + j].sum()), j))
        dominant, rest = sorted(order[:4]), sorted(order[4:])
        step = len(rest) // 3
        targets = [rest[step * j] for j in range(3)]
        others = [j for j in rest if j not in targets]
        with torch.no_grad():
            x = build(name).model.vision_tower(values["pixel_values"], output_hidden_states=True).hidden_states[0 + 1][i]
            block = build(name).model.vision_tower.encoder.layers[1]
            keys = eager.k_proj(block.layer_norm1(x)).view(17, 2, 16).mean(1)[1:]
            unit = keys / keys.norm(dim=1, keepdim=True)
            merged = {t: [] for t in targets}
            for j in others:
                merged[max(targets, key=lambda t: float(unit[j] @ unit[t]))].append(j)
            patch = hidden[i][1:]
            made = [patch[t] + sum(patch[j] for j in merged[t]) / max(len(merged[t]), 1) for t in targets]
            new = connector(torch.stack([hidden[i][0], *made]))
        stays = chosen.stays[i].nonzero()[:, 0].tolist()
        assert stays == sorted([*dominant, *targets, others[0]])
        program = [new[0], *(chosen.whole[i][j] for j in dominant), *new[1:]]
        if preset == "official":
            expected = torch.stack(program)
        else:
            at = dict(zip([others[0], *dominant, *targets], program))
            expected = torch.stack([at[j] for j in stays])
        assert (chosen.features[i][chosen.stays[i]] - expected).abs().max() <= 1e-5
        assert torch.equal(chosen.features[i][~chosen.stays[i]], chosen.whole[i][~chosen.stays[i]])


def test_fastervlm_by_hand():
    values = inputs("LLaVA-NeXT")
    chosen, probs = (
        Chosen(build("LLaVA-NeXT"), values, vtok.FasterVLM(keep_tokens=4)),
        tower_probs("LLaVA-NeXT", values)["image"][1],
    )
    for i in range(2):
        score = probs[3 * i, :, 0, 1:].mean(0)
        expected = sorted(range(16), key=lambda j: (-float(score[j]), j))[:4]
        assert chosen.stays[i][:16].nonzero()[:, 0].tolist() == sorted(expected)
        newline = build("LLaVA-NeXT").model.image_newline
        assert not chosen.stays[i][(chosen.whole[i] == newline).all(-1)].any()
        assert int(chosen.stays[i].sum()) == 12


def test_a_tower_without_a_class_token():
    """PaliGemma: what a patch receives, averaged over heads and queries."""
    values = inputs("PaliGemma")
    chosen = Chosen(build("PaliGemma"), values, vtok.FasterVLM(keep_tokens=4))
    for i, probs in enumerate(tower_probs("PaliGemma", values)["image"][1]):
        score = probs.mean((0, 1))
        assert set(chosen.stays[i].nonzero()[:, 0].tolist()) == set(score.topk(4).indices.tolist())


def test_vispruner_compares_what_leaves_the_tower():
    name, values = "LLaVA-1.5", inputs("LLaVA-1.5")
    hidden, _ = _hidden(name, values)
    attention = tower_probs(name, values)["image"][1][:, :, 0, 1:].mean(1)
    chosen = Chosen(build(name), values, vtok.VisPruner(keep_tokens=6))
    for i in range(3):
        order = sorted(range(16), key=lambda j: (-float(attention[i, j]), j))
        kept, rest = order[:3], order[3:]
        unit = hidden[i, 1:] / hidden[i, 1:].norm(dim=1, keepdim=True)
        while len(rest) > 3:
            even, odd = rest[0::2], rest[1::2]
            alike = {a: max(float(unit[a] @ unit[b]) for b in odd) for a in even}
            gone = min(8, len(rest) - 3, len(rest) // 2)
            rest = sorted(even, key=lambda a: -alike[a])[gone:] + odd
        assert chosen.stays[i].nonzero()[:, 0].tolist() == sorted(kept + rest)


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "LLaVA-OneVision", "Qwen2.5-VL"])
def test_downsampling_by_hand(name):
    """Joined crops are one grid with a newline behind every row; frames and images of any size are grids of their own."""
    values, model = inputs(name), build(name)
    chosen = Chosen(model, values, vtok.Downsample(keep=0.25))
    for stays, features, whole in zip(chosen.stays, chosen.features, chosen.whole):
        found, expected = features[stays], []
        newline = getattr(model.model, "image_newline", None)
        if name == "Qwen2.5-VL":
            grids = [whole.view(1, *((4, 4) if len(whole) == 16 else (2, 4)), -1)]
        elif len(whole) == 13:  # three frames of 2 x 2, one newline
            grids = [*whole[:12].view(3, 1, 2, 2, -1)]
        else:
            joint = whole[16:].view(1, -1, 9, whole.shape[1])[:, :, :8]
            grids = [whole[:16].view(1, 4, 4, -1), joint]
        for grid in grids:
            rows, columns = grid.shape[1:3]
            for i in range(-(-rows // 2)):
                line = range(i * rows // -(-rows // 2), -(-(i + 1) * rows // -(-rows // 2)))
                for j in range(columns // 2):
                    expected.append(grid[0, list(line), 2 * j : 2 * j + 2].mean((0, 1)))
                if columns == 8:
                    expected.append(newline)
        if len(whole) == 13:
            expected.append(newline)
        if name != "LLaVA-NeXT" or len(expected) == len(found):
            assert (found - torch.stack(expected)).abs().max() <= 1e-6
    assert not chosen.columns.all(1).any()


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen3-VL"])
def test_downsampling_needs_no_tower(name):
    config, values = vtok.Downsample(keep=0.5), inputs(name)
    reference = build(name)
    chosen = Chosen(reference, values, config)
    with MaskOracle(reference, dict.fromkeys(range(4), chosen.columns)):
        expected = generate(reference, encoded(values, chosen))
    assert_same(generate(vtok.patch(build(name), config), values), expected)

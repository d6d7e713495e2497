"""The functions a user calls: plans, budgets, info, saved configs, support, third-party methods."""

import copy
import json

import pytest
import timm
import torch
from zoo import Nothing, build, images

import vtok
from vtok.registry import encoder_methods
from vtok.targets.resolve import run_of


@pytest.fixture(scope="module")
def deit():
    with torch.device("meta"):
        return timm.create_model("deit_small_patch16_224")


def test_every_method_has_a_default_operating_point(deit):
    fractions = {}
    for name in encoder_methods():
        plan = vtok.plan(deit, name)
        assert plan.tokens[-1] < 197, name
        fractions[name] = plan.estimate.fraction
        assert vtok.plan(deit, METHOD_CLASSES[name]()).tokens == plan.tokens
    assert 0.58 < fractions["tome"] < 0.63
    assert all(0.4 < share < 0.9 for share in fractions.values()), fractions


METHOD_CLASSES = {name: vtok.METHODS.get(name) for name in vtok.METHODS.names()}


def test_known_operating_points(deit):
    """Token counts and MACs of the literature: ToMe r=13, PiToMe by ratio, Zero-TPrune's predecessor."""
    tome = vtok.plan(deit, "tome", r=13)
    assert tome.tokens[-1] == 41
    assert tome.estimate.base_macs / 1e9 == pytest.approx(4.60, abs=0.005)
    assert tome.estimate.macs / 1e9 == pytest.approx(2.70, abs=0.005)
    assert vtok.plan(deit, "tome", r=16).tokens[-1] == 11
    for ratio, left in ((0.9, 60), (0.925, 82), (0.95, 111), (0.975, 151)):
        assert vtok.plan(deit, "pitome", ratio=ratio).tokens[-1] == left
    zero = vtok.plan(deit, "zero_tprune", layers=[2, 5, 8], retain=[0.9, 0.8, 0.7], r=0)
    assert zero.estimate.macs / 1e9 == pytest.approx(3.548, abs=0.01)
    default = vtok.plan(deit, "zero_tprune")
    assert default.estimate.macs / 1e9 == pytest.approx(3.117, abs=0.01)


@pytest.mark.parametrize("target", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("method", encoder_methods(budget=True))
def test_budgets_are_met(deit, method, target):
    plan = vtok.plan(deit, method, flops=target)
    assert plan.budget.reached == plan.estimate.fraction
    assert plan.estimate.fraction == pytest.approx(target, abs=0.02)
    assert plan.budget.exact == (method != "ats")
    knob = ", ".join(plan.budget.knob)
    assert knob in str(plan) or knob.split(",")[0] in str(plan)


@pytest.mark.parametrize("method", encoder_methods(budget=True))
def test_the_whole_budget_reduces_nothing(method):
    model, x = build("timm: ViT"), images("timm: ViT")
    with torch.no_grad():
        reference = model(x)
        assert torch.equal(vtok.patch(model, method, flops=1.0)(x), reference)


def test_plans_need_no_forward_pass(deit):
    model = copy.deepcopy(deit)

    def refuse(*args, **kwargs):
        raise AssertionError("a forward pass was run")

    for module in model.modules():
        module.register_forward_pre_hook(refuse)
    for name in encoder_methods():
        assert vtok.plan(model, name).tokens[-1] < 197
    assert not vtok.info(model).patched


def test_bounds_say_that_they_are_bounds(deit):
    assert "upper bounds; pass calibration=images" in str(vtok.plan(deit, "ats"))
    assert "bound" not in str(vtok.plan(deit, "tome", r=8))


def test_calibration_measures_means():
    model, x = build("timm: ViT"), images("timm: ViT", batch=8)
    bound = vtok.plan(model, "ats", num_tokens=30)
    mean = vtok.plan(model, "ats", num_tokens=30, calibration=x)
    assert not bound.estimate.exact
    assert mean.estimate.exact
    assert all(m <= b for m, b in zip(mean.tokens, bound.tokens))
    assert mean.tokens[-1] < bound.tokens[-1]
    assert not vtok.info(model).patched
    vtok.patch(model, "ats", flops=0.6, calibration=x)
    with torch.no_grad():
        model(x)
    tower = vtok.info(model).towers[0]
    measured = (tower.mean_estimate or tower.estimate).fraction
    assert measured == pytest.approx(0.6, abs=0.03)
    assert measured == pytest.approx(tower.budget.reached, abs=1e-9)


def test_info_reports_what_happened():
    model, x = build("timm: ViT"), images("timm: ViT", batch=4)
    assert "not patched" in str(vtok.info(model))
    vtok.patch(model, "ats", num_tokens=40)
    assert "no forward pass yet" in str(vtok.info(model))
    text = str(vtok.info(model, probe=x))
    tower = vtok.info(model).towers[0]
    assert tower.blocks[0].tokens_in == 65
    assert tower.blocks[1].site == "pre"
    assert len(tower.blocks[-1].per_image) == 4
    assert max(tower.blocks[-1].per_image) == tower.blocks[-1].tokens_out
    assert "flash (cpu)" in text
    assert "implied speed-up" in text
    assert "without padding" in text


def test_info_says_when_another_size_is_run():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, dynamic_img_size=True).eval()
    vtok.patch(model, "tome", flops=0.7)
    with torch.no_grad():
        model(torch.randn(1, 3, 96, 96))
    assert "note: the last pass saw 36 patches; plans and budgets of this patch were made for 16" in str(vtok.info(model))


def test_plans_for_another_input_size(deit):
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True)
    assert vtok.plan(model, "tome", r=8, input_size=(3, 384, 384)).tokens[0] == 577 - 8
    assert vtok.plan(model, "tome", r=8).tokens[0] == 197 - 8


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("method", encoder_methods(budget=True))
def test_saved_configs_come_back(tmp_path, method, as_folder):
    path = tmp_path if as_folder else tmp_path / "run.json"
    model, x = build("timm: ViT"), images("timm: ViT")
    vtok.patch(model, method, flops=0.7)
    vtok.save_config(model, path)
    other = vtok.patch(build("timm: ViT"), str(path))
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    assert run_of(other).patch.configs == run_of(model).patch.configs
    vtok.save_config(other, path)
    content = json.loads((path / "vtok.json" if as_folder else path).read_text())
    assert content["towers"][0]["methods"][0]["method"] == method


@pytest.mark.parametrize(
    "config",
    [
        vtok.ToMe(r=(8, -1.0)),
        vtok.ToMe(r=[8, 4]),
        vtok.PiToMe(ratio=[0.9, 0.8], margin=0.5),
        vtok.PiToMe(r=3, preset="official_mae", prop_attn=True),
        vtok.ATS(keep=0.5, layers=(1, 2), score="per_head"),
        vtok.ZeroTPrune(layers=[1, 2], retain=[0.9, 0.8], iters=3, head_filter=None),
        vtok.RandomDrop(keep=0.7, seed=3, layers=[0]),
        vtok.UniformGrid(keep=0.7),
    ],
)
def test_configs_survive_json(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert vtok.METHODS.get(config.name).from_dict(values) == config


def test_supports():
    support = vtok.supports(build("timm: ViT average pool"))
    assert support
    assert support.methods["tome"] is None
    assert "class token" in support.methods["ats"]
    assert "4 blocks (Block x4)" in str(support)
    assert support.on_request == {"ats": {"query": "mean"}, "zero_tprune": {"cls_init": "uniform"}}
    assert '  ats: with query="mean": ats reads the attention of a class token' in str(support)
    assert "  tome: yes" in str(support)
    without_softmax = vtok.supports(build("timm: ViT differential attention"))
    assert without_softmax.on_request == {}
    assert "  ats: no: ats needs attention probabilities" in str(without_softmax)
    patched = vtok.patch(build("timm: ViT"), "tome", r=4)
    assert vtok.supports(patched).towers[0][3] == "Block x4"
    refused = vtok.supports(torch.nn.Linear(2, 2))
    assert not refused
    assert "not supported" in str(refused)


def test_a_model_inside_a_model():
    """Several towers, wrapped by a user's own module: every tower is found and patched on its own."""

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = build("timm: ViT"), build("timm: DeiT distilled")

        def forward(self, x):
            return self.left(x) + self.right(x)

    model, x = Pair(), images("timm: ViT")
    with torch.no_grad():
        reference = model(x)
        vtok.patch(model, "tome", r=6)
        model(x)
        towers = vtok.info(model).towers
        assert [t.path for t in towers] == ["left", "right"]
        assert [t.blocks[-1].tokens_out for t in towers] == [41, 42]
        assert torch.equal(vtok.unpatch(model)(x), reference)


def test_third_parties_register_methods(monkeypatch):
    vtok.METHODS.register("nothing")(Nothing)
    try:
        model, x = build("timm: ViT"), images("timm: ViT")
        with torch.no_grad():
            reference = model(x)
            assert torch.allclose(vtok.patch(model, "nothing")(x), reference, atol=1e-5)
    finally:
        vtok.METHODS._entries.pop("nothing")


def test_entry_points_are_read(monkeypatch):
    from importlib.metadata import EntryPoint

    from vtok import registry

    point = EntryPoint("theirs", "zoo:Nothing", "vtok.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "vtok.methods" else [])
    table = registry.Registry("method", {}, "vtok.methods")
    assert table.names() == ["theirs"]
    assert table.get("theirs").__name__ == "Nothing"

"""`vtok bench --beside`: other programs in the same rounds, on models of their own; toy programs stand in for checkouts."""

import json
import sys
import time

import pytest
import timm
import torch
import vlm_zoo
import zoo
from helpers_errors import message_of
from timm.models.vision_transformer import Block
from torch import nn
from typer.testing import CliRunner

import vtok
from vtok.eval.benchmarks import result as bench_result
from vtok.eval.benchmarks.programs import parse_beside
from vtok.eval.benchmarks.throughput import measure
from vtok.eval.cli.program import app
from vtok.eval.report.read import read
from vtok.eval.report.rows import row_of

NAME, TOWER = "timm: ViT", "transformers: ViT"
QUICK = {"pairs": 5, "memory": False, "profile": False}
DROPPED = 20  # tokens that the toy leaves out, of 65


def run(beside, method="random", model=None, inputs=None, **extra):
    model, inputs = zoo.build(NAME) if model is None else model, zoo.images(NAME) if inputs is None else inputs
    return measure(model, inputs, [method], beside=beside, **QUICK | extra)


def drops(model, seconds=0.0):
    """A toy program: in front of block 1 the last tokens go; it wraps what it is given."""

    def shorter(_module, args):
        time.sleep(seconds)
        return (args[0][:, :-DROPPED], *args[1:])

    model.blocks[1].register_forward_pre_hook(shorter)
    return nn.Sequential(model)


def test_a_row_says_what_the_program_does():
    ours, slow, quick = run({"slow": lambda model: drops(model, 0.1), "quick": drops})
    assert (ours.method, slow.method, slow.setting, slow.params) == ("random", "slow", "slow", {})
    assert slow.tokens == {"in": 65.0, "out": 45.0, "mean_per_layer": [65.0, 45.0, 45.0, 45.0]} == quick.tokens
    assert slow.gmacs == quick.gmacs and slow.gmacs["model"] < slow.gmacs["base"] == ours.gmacs["base"]
    assert slow.implied_speedup == pytest.approx(slow.gmacs["base"] / slow.gmacs["model"])
    assert slow.is_slower and slow.step_time_ms["patched"] > 100 > quick.step_time_ms["patched"]
    assert slow.speedup_ci[0] <= slow.speedup <= slow.speedup_ci[1]
    assert slow.step_time_ms["base"] == ours.step_time_ms["base"], "one run, one unpatched model"
    assert slow.peak_memory_mb is None and slow.reduction_share is None
    assert slow.kernel == {"base": "flash (cpu) x4", "patched": "flash (cpu) x4"}


@pytest.mark.parametrize("name", [NAME, TOWER])
def test_tokens_and_macs_are_what_the_program_computes(name):
    """vtok's own patch as another program: counted in one pass, it must cost what its closed form says."""
    own = {"itself": lambda model: vtok.patch(model, "tome", r=8), "nothing": lambda model: None}
    model, inputs = zoo.build(name), zoo.images(name)
    if name == TOWER:
        model, inputs = model.model, {"pixel_values": inputs}
    ours, itself, nothing = run(own, ("tome", {"r": 8}), model=model, inputs=inputs)
    assert itself.tokens["mean_per_layer"] == ours.tokens["mean_per_layer"]
    assert itself.gmacs["model"] == pytest.approx(ours.gmacs["model"] + ours.gmacs["pruner"])
    assert nothing.gmacs["model"] == nothing.gmacs["base"] and nothing.tokens["out"] == nothing.tokens["in"]


def test_programs_are_timed_in_the_rounds_of_all_others():
    log = []

    def logs(name):
        return lambda model: model.register_forward_hook(lambda *_: log.append(name)) and None

    model = zoo.build(NAME)
    run({"a": logs("a"), "b": logs("b")}, model=model, warmup=3)
    assert log[:4] == ["a", "a", "b", "b"], "each is seen in a pass, and counted in another"
    assert log[4:10] == ["a"] * 3 + ["b"] * 3, "warm before any is timed"
    rounds = [log[start : start + 4] for start in range(10, len(log), 4)]
    assert len(rounds) == 5 and all(one in (["a", "a", "b", "b"], ["b", "b", "a", "a"]) for one in rounds)
    assert len({tuple(one) for one in rounds}) == 2, "in an order that is drawn"


def spoils(model):
    """Changes all that a program can lay its hands on."""
    for parameter in model.parameters():
        parameter.data.zero_()
    del model.blocks[1:]
    model.blocks[0].__class__ = type("Spoilt", (Block,), {"forward": lambda self, x, **_: x})
    model.train()


def test_nothing_reaches_the_unpatched_model():
    model, images = zoo.build(NAME).train(), zoo.images(NAME)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = model.eval()(images)
        alone = run({}, model=model.train())[0]
        ours, spoilt = run({"spoilt": spoils}, model=model)
        assert model.training and torch.equal(model.eval()(images), before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert (ours.gmacs, ours.tokens, ours.kernel) == (alone.gmacs, alone.tokens, alone.kernel)
    assert spoilt.gmacs["model"] < 0.1 * spoilt.gmacs["base"] and spoilt.tokens["mean_per_layer"] is None


def test_a_class_replaced_for_the_whole_process_is_refused_and_put_back():
    forward = Block.forward
    said = message_of(vtok.ConfigError, run, {"greedy": lambda model: setattr(Block, "forward", lambda self, x, **_: x)})
    assert said.startswith("greedy replaces Block.forward for the whole process") and "that it is given alone" in said
    assert Block.forward is forward
    message_of(vtok.ConfigError, run, {"greedy": lambda model: setattr(type(model), "__call__", lambda self, x: x)})
    assert "__call__" not in vars(timm.models.VisionTransformer)
    attention = nn.functional.scaled_dot_product_attention

    def everywhere(model):
        nn.functional.scaled_dot_product_attention = lambda q, k, v, **_: v

    assert "functional.scaled_dot_product_attention" in message_of(vtok.ConfigError, run, {"greedy": everywhere})
    assert nn.functional.scaled_dot_product_attention is attention


def test_a_model_that_is_given_is_timed_as_it_is():
    other = zoo.build(NAME).double().train()
    del other.blocks[2:]
    (_, given) = run({"shallow": other})
    assert given.implied_speedup == pytest.approx(2, rel=0.2) and given.tokens["out"] is None
    assert other.training and next(other.parameters()).dtype == torch.float64


def test_a_model_that_is_given_is_timed_in_eval_mode():
    modes = []
    tower = zoo.build(NAME)
    other = nn.Sequential(tower, nn.BatchNorm1d(tower(zoo.images(NAME)).shape[1])).train()
    other[1].register_forward_pre_hook(lambda module, _args: modes.append(module.training))
    run({"other": other})
    assert modes and not any(modes)
    assert other.training and other[1].training
    assert not other[1].running_mean.any() and other[1].num_batches_tracked == 0


def test_a_registry_that_the_unpatched_model_reads_is_noticed():
    registry = {"scale": 1.0}

    class Scaled(nn.Module):
        def forward(self, x):
            return x * registry["scale"]

    model = zoo.build(NAME)
    model.norm = nn.Sequential(model.norm, Scaled())

    def program(_model):
        registry["scale"] = 2.0

    said = message_of(vtok.ConfigError, run, {"loud": program}, model=model)
    assert said.startswith("the unpatched model computes something else once loud was made")


def test_settings_of_torch_are_put_back():
    before = torch.get_num_threads()
    said = message_of(vtok.ConfigError, run, {"wide": lambda _model: torch.set_num_threads(before + 1)})
    assert "wide changes torch's number of threads for the whole process (put back now)" in said
    assert torch.get_num_threads() == before


def fails(_model):
    raise KeyError("no such thing")


MODEL = zoo.build(NAME)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (3, "beside x: pass a model, or a function that is given a copy of one, got 3"),
        (lambda model: 3, "beside x: the function must return a model, or None if it changed its own, got 3"),
        (fails, "x cannot change this VisionTransformer: KeyError: 'no such thing'"),
        (lambda model: nn.Linear(2, 2), "x cannot run what the unpatched VisionTransformer runs: RuntimeError: "),
        (lambda model: nn.Sequential(MODEL), "x shares modules with the unpatched model; let it change a copy"),
    ],
)
def test_what_is_no_program_is_refused(other, said):
    assert message_of(vtok.ConfigError, run, {"x": other}, model=MODEL).startswith(said)


def test_from_python():
    speeds = vtok.benchmark(zoo.build(NAME), "random", zoo.images(NAME), pairs=5, beside={"toy": drops})
    assert [one["setting"] for one in speeds.records] == ["random", "toy"]
    assert "toy" in str(speeds) and "MACs of toy are counted in one pass" in speeds.markdown()
    assert list(speeds.to_pandas()["setting"]) == ["random", "toy"] and speeds.plot() is not None
    assert "beside maps names to models" in message_of(
        vtok.ConfigError, vtok.benchmark, zoo.build(NAME), "random", zoo.images(NAME), beside=[drops]
    )
    name = next(iter(vlm_zoo.EXAMPLES))
    prompts = vlm_zoo.build(name), "random", vlm_zoo.inputs(name)
    assert message_of(vtok.ConfigError, vtok.benchmark, *prompts, beside={"toy": drops}).startswith(
        "beside is for vision encoders"
    )


FILE = """
def change(model, tokens=2):
    print("prints something")
    model.blocks[1].register_forward_pre_hook(lambda _module, args: (args[0][:, :-tokens], *args[1:]))
"""


def test_on_the_command_line(tmp_path):
    file, records = tmp_path / "mine.py", tmp_path / "records.json"
    file.write_text(FILE)
    command = ["bench", "vit_tiny_patch16_224", "tome:r=8", "--img-size", "64", "-b", "2", "--pairs", "5", "--no-memory"]
    command += ["--markdown", "--json", str(records), "--beside", f"mine:tokens=4@{file}", "--beside", f"mine@{file}"]
    ran = CliRunner().invoke(app, command, catch_exceptions=False)
    assert ran.exit_code == 0 and ran.stdout.startswith("| method"), "what programs print does not go where tables go"
    assert "| mine(tokens=4) | 17 -> 13 |" in ran.stdout
    held = bench_result.from_json(records.read_text())
    assert [one.setting for one in held] == ["tome(r=8)", "mine(tokens=4)", "mine"] and len(
        json.loads(records.read_text())
    ) == 3
    rows = [row_of(record) for record in read([records]).records]
    assert [row.label for row in rows] == ["tome(r=8)", "mine(tokens=4)", "mine"]
    assert rows[1].total_gmacs == held[1].gmacs["model"] and rows[1].reduction is None


@pytest.fixture
def checkouts(tmp_path):
    """Toy checkouts with the layout of ToMe's and PiToMe's; the second's packages import what is not installed."""
    tome, pitome = tmp_path / "ToMe" / "tome" / "patch", tmp_path / "PiToMe" / "algo" / "pitome" / "patch"
    for folder in (tome, pitome):
        folder.mkdir(parents=True)
    (tome.parent / "__init__.py").write_text("")
    (tome.parent / "merge.py").write_text("def less(x, r):\n    return x[:, : x.shape[1] - r]\n")
    (tome / "__init__.py").write_text("")
    (tome / "timm.py").write_text(
        "from tome.merge import less\n"
        "def apply_patch(model, prop_attn):\n"
        "    assert prop_attn\n"
        "    model.blocks[1].register_forward_pre_hook(lambda _m, args: (less(args[0], model.r), *args[1:]))\n"
    )
    for folder in (pitome, pitome.parent, pitome.parent.parent):
        (folder / "__init__.py").write_text("import lavis_that_is_not_installed\n")
    (pitome.parent / "merge.py").write_text("def less(x, ratio):\n    return x[:, : int(x.shape[1] * ratio)]\n")
    (pitome / "deit.py").write_text(
        "from ..merge import less\n"
        "def apply_patch(model):\n"
        "    class Older(model.__class__):\n"
        "        def forward(self, x):\n"
        "            return super().forward(x), 0\n"
        "        def forward_features(self, x):\n"
        "            x = self.patch_embed(x)\n"
        "            x = x + self.pos_embed[:, 1:]\n"
        "            assert self.dist_token is None\n"
        "            for block in self.blocks:\n"
        "                x = block(less(x, self.ratio))\n"
        "            return self.pre_logits(self.norm(x)[:, 0])\n"
        "    model.__class__ = Older\n"
        "    print('using')\n"
    )
    return f"tome:r=9@{tmp_path / 'ToMe'}", f"pitome:ratio=0.5@{tmp_path / 'PiToMe'}"


def test_checkouts_that_are_known(checkouts):
    paths, loaded = list(sys.path), {name for name in sys.modules if name.startswith(("tome", "algo"))}
    _, tome, pitome = run(parse_beside(checkouts))
    assert (tome.setting, pitome.setting) == ("official tome(r=9)", "official pitome(ratio=0.5)")
    assert tome.tokens["mean_per_layer"] == [65.0, 56.0, 56.0, 56.0]
    assert pitome.tokens["mean_per_layer"] == [32.0, 16.0, 8.0, 4.0]
    assert sys.path == paths and {name for name in sys.modules if name.startswith(("tome", "algo"))} == loaded


def test_what_is_no_checkout_or_file_is_refused(checkouts, tmp_path):
    empty, broken, file = tmp_path / "empty.py", tmp_path / "broken.py", tmp_path / "mine.py"
    empty.write_text("x = 3\n")
    broken.write_text("import nowhere\n")
    left = tmp_path / "leaves.py"
    left.write_text("import sys\nsys.exit(3)\n")
    file.write_text(FILE)
    for text, said in (
        ("tome", "--beside takes NAME:key=value,...@PATH, e.g. tome:r=13@../ToMe or mine:r=13@mine.py, got 'tome'"),
        ("@here", "--beside takes NAME:key=value"),
        (f"tome:r=8@{tmp_path}", f"{tmp_path} holds no tome/patch/timm.py; clone https://github.com/facebookresearch/ToMe"),
        (f"pitome:ratio=0.9@{tmp_path}", f"{tmp_path} holds no algo/pitome/patch/deit.py; clone "),
        (f"other:r=8@{tmp_path}", "checkouts are known of tome, pitome; for others name a .py file"),
        (checkouts[0].replace("r=9", "q=9"), "missing a required argument: 'r'"),
        (f"mine:q=9@{file}", "got an unexpected keyword argument 'q'"),
        (f"mine@{tmp_path / 'none.py'}", "none.py is no file; name one that defines change(model, **parameters)"),
        (f"mine@{empty}", "empty.py defines no change(model, **parameters), which is given a copy of the model"),
        (f"mine@{broken}", "broken.py cannot be run: ModuleNotFoundError: No module named 'nowhere'"),
        (f"mine@{left}", "leaves.py cannot be run: SystemExit: 3"),
        ("mine:r@mine.py", "write a method as"),
        ("mine@a\0b.py", "is no file"),
        (f"tome:r=8@{'x' * 3000}", "holds no tome/patch/timm.py"),
    ):
        assert said in message_of(vtok.ConfigError, parse_beside, [text]), text
    assert "is there already" in message_of(vtok.ConfigError, parse_beside, [f"mine@{file}"] * 2)


def test_only_encoders_that_torch_runs(checkouts):
    for more in (["reference", "tome", "--runtime", "onnxruntime"], ["transformers:llava-1.5-scaled", "random"]):
        refused = CliRunner().invoke(app, ["bench", *more, "--beside", checkouts[0]])
        assert str(refused.exception) == "--beside is for vision encoders that torch runs; leave it out"

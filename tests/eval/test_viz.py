"""Token maps: what the pictures hold is what the model did."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from zoo import build, images

import vtok
from vtok.errors import ConfigError, UnknownNameError
from vtok.eval import visualize
from vtok.eval.cli.program import app
from vtok.eval.viz import input as viz_input
from vtok.eval.viz.draw import Stage, TokenMaps, View
from vtok.eval.viz.overlay import legend, paint
from vtok.eval.viz.prompt_overlay import all_that_stays
from vtok.targets.resolve import run_of

RUN = CliRunner()
ENCODERS = ("timm: ViT", "open_clip: ViT", "transformers: ViT", "transformers: CLIP tower")


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("method", ["tome", "random"])
def test_maps_of_an_encoder_are_those_of_its_pass(name, method):
    model, x = build(name), images(name, batch=1)
    maps = visualize(model, method, x, flops=0.6)
    assert not vtok.info(model).patched
    with vtok.patched(model, method, flops=0.6, trace=True, input_size=tuple(x.shape[1:])), torch.no_grad():
        model(x)
        run = run_of(model)
        groups = [s.group[0, run.num_prefix :] for s in run.current.states[1:]]
    assert len(maps.stages) == len(groups) == 4 and [s.name for s in maps.stages][-1] == "block 3"
    for stage, group in zip(maps.stages, groups):
        left = len(group[group >= 0].unique())
        assert stage.tokens == left
        if method == "tome":  # random draws anew
            assert (stage.maps[0] == group.numpy()).all()
    assert maps.patches == 64 and maps.stages[-1].tokens < maps.stages[0].tokens < 64
    dropped = (maps.stages[-1].maps[0] < 0).sum()
    assert dropped == 0 if method == "tome" else dropped == 64 - maps.stages[-1].tokens


def test_pictures_show_the_maps():
    pixels = np.full((16, 16, 3), 0.8)
    pixels[:, 8:] = 0.2
    view = View(pixels, (2, 2))
    drawn = view.draw(np.array([0, 0, 2, -1]), side=64)
    assert drawn.shape == (64, 64, 3)
    merged, alone, dropped = drawn[:28, :28], drawn[36:, :28], drawn[36:, 36:]
    assert np.allclose(alone, 0.8)
    assert not np.allclose(merged[2, 2], 0.8) and np.allclose(merged[2, 2], drawn[2, 60])  # one colour for both
    assert dropped[10, 10, 2] > dropped[10, 10, 0] and 0.4 < dropped[10, 10, 2] < 0.7 and dropped[10, 10, 0] < 0.3
    assert not np.allclose(drawn[32, 10], alone[0, 0])  # an outline between the rows
    assert np.allclose(view.draw(None, side=64)[:, :32], 0.8)


def test_sheets_and_animations(tmp_path):
    maps = visualize(build("timm: ViT"), "pitome", images("timm: ViT", batch=1), ratio=0.8)
    sheet = Image.open(maps.save(tmp_path / "new" / "maps.png"))
    assert sheet.width > 900
    film = Image.open(maps.save(tmp_path / "maps.gif"))
    assert film.n_frames == len(maps.stages) + 1 and film.info["loop"] == 0
    frames = []
    for i in range(film.n_frames):
        film.seek(i)
        frames.append(np.asarray(film.convert("RGB"), int))
    assert all(np.abs(a - b).mean() > 0.3 for a, b in pairwise(frames))
    assert Image.open(io.BytesIO(maps._repr_png_())).size == sheet.size
    with pytest.raises(ConfigError, match=r"written as \.png or \.gif, got 'maps\.bmp'"):
        maps.save("maps.bmp")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        maps.save(tmp_path / "file" / "maps.png")


def test_a_long_heading_stays_on_the_sheet():
    from dataclasses import replace

    maps = visualize(build("timm: ViT"), "tome", images("timm: ViT", batch=1))
    maps = replace(maps, title=f"{maps.title}, asked {'what is on the plate that is black ' * 4}", stages=maps.stages[:1])
    sheet = np.asarray(Image.open(io.BytesIO(maps.png())).convert("L"))
    heading = sheet[: len(sheet) // 3]
    assert (heading < 128).any()
    assert (heading[:, :3] == 255).all() and (heading[:, -3:] == 255).all()


def test_a_sheet_leaves_the_backend_alone(monkeypatch):
    """A notebook that has shown token maps goes on to show other plots."""
    import matplotlib

    monkeypatch.setattr(matplotlib, "use", lambda *_, **__: pytest.fail("the backend is the caller's"))
    view = View(np.full((16, 16, 3), 0.8), (2, 2))
    maps = TokenMaps("a", (view,), (Stage("block 0", (np.array([0, 0, 2, -1]),), 2),), 4)
    assert Image.open(io.BytesIO(maps._repr_png_())).width > 100


def test_several_views_stand_side_by_side():
    one = View(np.ones((8, 8, 3)), (2, 2))
    stage = Stage("layer", (np.arange(4), None), 7)
    pair = TokenMaps("t", (one, View(np.zeros((8, 16, 3)), (1, 4))), (stage,), 8)
    drawn = pair.draw(stage, side=32)
    assert drawn.shape[1] > 64 and pair.caption(stage) == "layer: 7 of 8"
    many = TokenMaps("t", (one,) * 5, (), 20).draw(side=32)
    assert many.shape[1] > 3 * 32 and many.shape[0] > 2 * 32


def test_an_image_file_is_prepared_as_the_model_wants_it(tmp_path):
    colours = np.zeros((40, 60, 3), np.uint8)
    colours[..., 0] = np.linspace(0, 255, 60)[None]
    path = tmp_path / "image.png"
    Image.fromarray(colours).save(path)
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32).eval()
    made = viz_input.prepared(model, path)
    assert made.pixels.shape == (1, 3, 32, 32) and made.note == ""
    assert made.picture.shape == (32, 32, 3) and made.picture[..., 1].max() < 0.02 and made.picture[..., 0].max() > 0.8
    maps = visualize(build("transformers: ViT"), "tome", path, r=8)
    assert maps.notes and "does not say" in maps.notes[0]
    own = visualize(model, "tome", path, r=1, transform=lambda image: torch.rand(3, 32, 32))
    assert own.patches == 4


def test_dual_encoders_are_drawn_by_their_image_tower(tmp_path):
    from vtok.eval.models.reference import load_reference_clip

    net = load_reference_clip().net
    maps = visualize(net, "tome", Image.new("RGB", (200, 100), "red"), r=8)
    assert maps.notes == () and maps.patches == 256 and maps.views[0].picture[..., 1:].max() < 0.01
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=small | {"vocab_size": 20}, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=8
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained(tmp_path / "clip")
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "blue.png")
    for model in (f"transformers:{tmp_path / 'clip'}", transformers.CLIPModel.from_pretrained(tmp_path / "clip")):
        maps = visualize(model, "tome", tmp_path / "blue.png", r=2)
        assert maps.notes == () and [s.tokens for s in maps.stages] == [14, 12]
        assert maps.views[0].picture[..., 2].min() > 0.98 and maps.views[0].picture[..., 0].max() < 0.02


def test_bad_input_is_explained(tmp_path):
    model = build("timm: ViT")
    with pytest.raises(ConfigError, match=r"nothing\.png does not exist"):
        visualize(model, "tome", tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ConfigError, match="cannot be read as an image"):
        visualize(model, "tome", tmp_path / "text.png")
    with pytest.raises(ConfigError, match="one image is drawn at a time"):
        visualize(model, "tome", images("timm: ViT", batch=2))
    with pytest.raises(UnknownNameError, match="unknown method"):
        visualize(model, "nonsense", images("timm: ViT", batch=1))
    with pytest.raises(ConfigError, match="comes without images"):
        visualize(model, "tome", 3)
    with pytest.raises(ConfigError, match="images 0 to 9999"):
        visualize("reference", "tome", 10_000)


def test_the_command_draws_the_reference_model(tmp_path):
    sheet, film = tmp_path / "a.png", tmp_path / "a.gif"
    done = RUN.invoke(
        app, ["viz", "reference", "tome:flops=0.6", "3", "-o", str(sheet), "-o", str(film)], catch_exceptions=False
    )
    assert done.exit_code == 0 and "block 11" in done.output and str(sheet) in done.output.replace("\n", "")
    assert Image.open(sheet).width > 900 and Image.open(film).n_frames == 13
    bad = RUN.invoke(app, ["viz", "reference", "tome", "3", "-o", "a.svg"])
    assert isinstance(bad.exception, ConfigError) and "a.svg" in str(bad.exception)


def test_names_are_imported_when_asked_for():
    import vtok.eval

    assert "visualize" in vtok.eval.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vtok.eval.nonsense  # noqa: B018


def test_colours_are_told_as_far_as_there_are_some():
    alone, merged, dropped = np.arange(4), np.array([0, 0, 1, 2]), np.array([0, -1, 1, 2])
    assert legend([None, alone]) == ""
    assert legend([alone, merged]) == "merged patches share a colour"
    assert legend([dropped]) == "dropped patches are blue"
    assert legend([merged, dropped]) == "dropped patches are blue, merged ones share a colour"


def test_a_group_keeps_its_colour_from_block_to_block():
    """Groups are numbered anew in every block, by the tokens that are left."""
    picture = np.zeros((8, 8))
    early = paint(picture, np.array([0, 1, 2, 2, *range(3, 15)]), (4, 4))
    late = paint(picture, np.array([0, 0, 1, 1, 1, *range(2, 13)]), (4, 4))
    assert np.allclose(early[0, 4:], late[0, 4:]) and not np.allclose(late[0, 0], late[0, 4])


def test_dropped_patches_show_on_black_and_on_white():
    dropped = np.array([-1, 0, 1, 2])
    for shade in (0.0, 1.0):
        pixels = paint(np.full((4, 4), shade), dropped, (2, 2))
        assert np.abs(pixels[0, 0] - pixels[0, 2]).max() > 0.4


def test_what_a_method_keeps_at_least_is_told():
    config = vtok.Correlation(alpha=0.5, min_tokens=2)
    assert all_that_stays([vtok.ToMe(), config], 2) == "its minimum"
    assert all_that_stays([config], 3) == all_that_stays([vtok.ToMe()], 1) == ""

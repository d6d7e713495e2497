"""Token maps of vision-language models: the tower, the prompt, and what is answered."""

import pytest

pytest.importorskip("transformers")

from helpers_vqa import picture, tiny_llava, tiny_next

import vtok
from vtok.errors import ConfigError
from vtok.eval import visualize
from vtok.eval.tasks.vqa.pipeline import answer


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


def test_kept_tokens_before_the_llm(llava):
    maps = visualize(llava, "uniform", picture(0), question="what color is the shape?", keep=0.5, new_tokens=3)
    (stage,) = maps.stages
    assert stage.name == "decoder layers 0 to 3" and stage.tokens == 8 and maps.patches == 16
    assert (stage.maps[0] >= 0).sum() == 8
    inputs = llava.inputs([picture(0)], ["what color is the shape?"])
    with vtok.patched(llava.net, "uniform", keep=0.5) as net:
        assert maps.answer == answer(llava, net, inputs, 3).texts[0]


def test_the_tower_comes_before_the_llm(llava, tmp_path):
    methods = [vtok.METHODS.get("pitome")(ratio=0.8), vtok.METHODS.get("random")(keep=0.5)]
    maps = visualize(llava, methods, picture(1), question="is there a circle?")
    assert [s.name for s in maps.stages] == ["vision tower, block 0", "vision tower, block 1", "decoder layers 0 to 3"]
    counts = [s.tokens for s in maps.stages]
    assert 16 > counts[0] > counts[1] > counts[2] > 0
    assert maps.save(tmp_path / "maps.png").stat().st_size > 1000


def test_pages_are_drawn_as_overview_and_crops():
    model = tiny_next()
    maps = visualize(model, "random", picture(2).resize((32, 32)), question="is top left blank?", keep=0.5)
    assert [view.name for view in maps.views] == ["overview", "crops"]
    stage = maps.stages[-1]
    rows, columns = maps.views[1].grid
    assert len(stage.maps[1]) == rows * columns > len(stage.maps[0])
    shown = sum(int((one >= 0).sum()) for one in stage.maps)
    assert shown <= stage.tokens <= shown + rows  # newline tokens count, but show nothing


def test_a_module_needs_its_processor(llava):
    with pytest.raises(ConfigError, match="pass its processor"):
        visualize(llava.net, "random", picture(0))
    maps = visualize(llava.net, "random", picture(0), processor=llava.processor, keep=0.25)
    assert maps.stages[0].tokens == 4 and "What is shown here?" in maps.title
    with pytest.raises(ConfigError, match="comes without images"):
        visualize(llava, "random", 3)

"""What the README says can be done is done here: every snippet runs, every command parses, every file is there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

import numpy as np
import timm
import transformers
import typer.main
from PIL import Image

import vtok
from vtok.eval.cli.program import app
from vtok.serving import TokenChoice, VLMInfo

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.S | re.M)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]


def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def clip_pipeline(task, model):
    """The pipeline of that task around a tiny CLIP: weights by name need a network."""
    from test_hf_pipelines import clip, pipeline, processor, tokenizer
    from transformers import CLIPImageProcessor

    tiny = clip()
    words = ["This", "is", "a", "photo", "of", "cat.", "dog."]
    return pipeline(task, model=tiny, tokenizer=tokenizer(words), image_processor=processor(CLIPImageProcessor))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Pretrained models become random, tiny or bundled ones; everything else in a snippet is taken as it stands."""
    create, llava = timm.create_model, ROOT / "assets" / "easyvqa_llava"
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **extra: create(name, **extra))
    for cls in (transformers.AutoProcessor, transformers.LlavaForConditionalGeneration):
        load = cls.from_pretrained.__func__
        monkeypatch.setattr(
            cls, "from_pretrained", classmethod(lambda cls, name, load=load, **extra: load(cls, llava, **extra))
        )
    from test_hf_pipelines import clip  # noqa: F401  (imports the real pipeline before it is replaced)

    # A lazy module, which puts a new object into sys.modules now and then: the name is replaced where it is defined, too.
    monkeypatch.setattr(sys.modules["transformers.pipelines"], "pipeline", clip_pipeline)
    monkeypatch.setattr(sys.modules["transformers"], "pipeline", clip_pipeline)
    monkeypatch.chdir(tmp_path)
    photo().save("photo.jpg")


def test_every_snippet_runs_in_order(offline):
    """One after the other, as a reader would; `images` and `image` are all that they are given."""
    torch.manual_seed(0)
    names = {"images": torch.randn(2, 3, 224, 224), "image": photo(), "vtok": vtok}
    assert len(SNIPPETS) >= 5
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), names)
    assert vtok.info(names["model"]).patched
    assert names["answer"].shape[0] == 1
    assert names["short"]["input_ids"].shape[1] < names["inputs"]["input_ids"].shape[1]


def parse(command, words):
    """Walks down to the sub-command and lets it read its arguments, without running it."""
    context = None
    while hasattr(command, "commands"):
        context = typer.Context(command, info_name=command.name, parent=context)
        _, command, words = command.resolve_command(context, list(words))
    command.make_context(command.name, list(words))


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line):
    words = shlex.split(line)
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    if words[:2] == ["torchrun", "--nproc_per_node"]:
        words = words[3:]
    if words[:2] == ["-m", "vtok.eval"]:
        words = ["vtok", *words[2:]]
    program, *rest = words
    if program == "vtok":
        parse(typer.main.get_command(app), rest)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(rest) <= set(targets)
    elif program == "vllm":
        settings = json.loads(rest[rest.index("--hf-overrides") + 1])["vtok"]
        assert rest[0] == "serve" and TokenChoice(settings, VLMInfo("a model", 4, 16, 2)).tower_blocks == ()
    else:
        assert program in ("pip", "lmms-eval")


def test_every_file_it_names_is_there():
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)\)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_a_newcomer_reads_it_in_five_minutes():
    """About 230 words a minute; tables, code and what is folded away are looked at, not read."""
    prose = re.sub(r"^```.*?^```|<details>.*?</details>|^\|.*?$", "", README, flags=re.S | re.M)
    assert len(prose.split()) < 1300


@pytest.mark.slow
def test_the_docstrings_render(tmp_path):
    """`make docs`."""
    done = subprocess.run([sys.executable, "-m", "vtok.eval.docs", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    texts = {
        name: (tmp_path / name).read_text(encoding="utf-8")
        for name in ("vtok.html", "vtok/patches.html", "vtok/eval/demo/vit.html")
    }
    assert "276 of the 297" in texts["vtok/patches.html"]
    assert "<table>" in texts["vtok/eval/demo/vit.html"]
    assert 'id="PiToMe"' in texts["vtok.html"]
    assert (tmp_path / "vtok" / "methods" / "todre.html").is_file()

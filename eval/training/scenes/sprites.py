"""Makes the little pictures of `vtok.eval.models.scenes`: `python -m vtok.eval.training.scenes.sprites FOLDER --export assets`.

FOLDER holds, unpacked, four packages of npm (`npm pack NAME`, `tar xzf`): see `SOURCES`. Pictures that are drawn as curves are
rendered by resvg (`pip install resvg-py`).
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from vtok.eval.models.scenes.album import SHEET, THINGS, sheet_name

# Artist -> (folder within FOLDER, files of its pictures, "" = curves in one file; whose they are, licence).
SOURCES = {
    "noto": ("google/package", "img/google/64/{}.png", "emoji-datasource-google 15.1.2: Noto Color Emoji, Google, Apache-2.0"),
    "twemoji": (
        *("twitter/package", "img/twitter/64/{}.png"),
        "emoji-datasource-twitter 15.1.2: Twemoji, Twitter and contributors, CC-BY-4.0",
    ),
    "fluent-3d": ("f3d/package", "assets/{}.webp", "@lobehub/fluent-emoji-3d 1.1.0: Fluent Emoji, Microsoft, MIT"),
    "fluent-flat": ("flat/package", "", "@iconify-json/fluent-emoji-flat 1.2.3: Fluent Emoji, Microsoft, MIT"),
    "noto-v1": ("noto-v1/package", "", "@iconify-json/noto-v1 1.2.5: Noto Emoji of 2014, Google, Apache-2.0"),
    "emojione": ("emojione/package", "", "@iconify-json/emojione 1.2.3: Emoji One 2, JoyPixels, CC-BY-4.0"),
    "fxemoji": ("fxemoji/package", "", "@iconify-json/fxemoji 1.2.2: FxEmojis, Mozilla, Apache-2.0"),
    "streamline": ("streamline-emojis/package", "", "@iconify-json/streamline-emojis 1.2.4: Streamline, CC-BY-4.0"),
}


def _picture(artist: str, source: Path, code: str) -> Image.Image | None:
    """One emoji; `None` = the artist did not draw it."""
    place, files, _ = SOURCES[artist]
    if not files:
        return _curves(source / place, _called(source, code))
    bare = code.removesuffix("-fe0f")
    found = [path for c in (code, bare, f"{bare}-fe0f") if (path := source / place / files.format(c)).is_file()]
    return Image.open(found[0]).convert("RGBA") if found else None


def _called(source: Path, code: str) -> str:
    """Name of an emoji, as the sets of Iconify have it."""
    names = json.loads((source / SOURCES["fluent-flat"][0] / "chars.json").read_text(encoding="utf-8"))
    return names.get(code) or names[code.removesuffix("-fe0f")]


def _curves(folder: Path, name: str) -> Image.Image | None:
    resvg_py: Any = importlib.import_module("resvg_py")
    icons: Any = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    found = icons["icons"].get(name) or icons["icons"].get(name.replace("-", ""))
    if found is None:
        return None
    width, height = (found.get(side, icons.get(side, 16)) for side in ("width", "height"))
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{found["body"]}</svg>'
    )
    data = resvg_py.svg_to_bytes(svg_string=text, width=128, height=128)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def sheet(artist: str, source: Path) -> Image.Image:
    """All little pictures of an artist, one beside the other."""
    codes = [code for codes in THINGS.values() for code in codes]
    row = Image.new("RGBA", (SHEET * len(codes), SHEET))
    for i, code in enumerate(codes):
        picture = _picture(artist, source, code)
        if picture is None:
            print(f"{artist} has no {code}")
            continue
        cut = picture.crop(picture.getbbox())
        cut.thumbnail((SHEET, SHEET), Image.Resampling.LANCZOS)
        row.paste(cut, (i * SHEET + (SHEET - cut.width) // 2, (SHEET - cut.height) // 2))
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--export", type=Path, required=True, help="vtok's assets/")
    args = parser.parse_args()
    for artist in SOURCES:
        path = args.export / sheet_name(artist)
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet(artist, args.folder).save(path, lossless=True, method=6)


if __name__ == "__main__":
    main()

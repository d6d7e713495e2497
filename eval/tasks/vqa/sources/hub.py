"""Rows of the `datasets` library instead of files: a folder that it saved, parquet files, or a name on the hub.

The names that lmms-eval 0.7 reads are the defaults, which every task states itself (most ask for a login to the hub).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vtok.errors import ConfigError, MissingExtraError, shown
from vtok.eval.common.pictures import digest, find_files, open_picture
from vtok.eval.tasks.vqa.sources import Sources
from vtok.eval.tasks.vqa.sources.rows import Row, Rows
from vtok.eval.tasks.vqa_video.videos import Videos

HUB = "hub"
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder


class Cell(NamedTuple):
    """An image in a column that is not called "image", or (`number`) in a list there; a tuple of them is shown together."""

    row: int
    column: str
    number: int | None = None


class Hub(NamedTuple):
    """Where the rows of a task are.

    Attributes:
        path: of the data set on the hub.
        config: its configuration, `None` = the only one.
        split: that is asked.
        form: of a row, for messages.
        images: configuration that holds the images apart, "" = they stand in the rows.
        image_id: column that names a row's image there, whose rows have an `id`.
        same_image: column that is equal for rows with the same image, "" = none is known.
        optional: whether a row may have no image.
        columns: that hold images; the image of a row is then its number, see `Cell`.
        sizes: whether a row is given the `width` and `height` of its image, in pixels.
        video: column with the name of a video, a file in the folder of the images; "" = rows are about images.
    """

    path: str
    config: str | None
    split: str
    form: str
    images: str = ""
    image_id: str = ""
    same_image: str = ""
    optional: bool = False
    columns: tuple[str, ...] = ("image",)
    sizes: bool = False
    video: str = ""


def is_dataset(data: str) -> bool:
    """Whether data means the `datasets` library: "hub", "hub:NAME", a folder that it saved, of these, or of parquet files."""
    folder = Path(data)
    if data == HUB or data.startswith(f"{HUB}:"):
        return True
    return folder.is_dir() and any(
        any(folder.glob(f"{depth}{name}")) for depth in ("", "*/") for name in (*_SAVED, "*.parquet")
    )


def read(name: str, hub: Hub, sources: Sources) -> Rows:
    """The rows of a task's data set; images are decoded when they are asked about.

    Raises:
        ConfigError: no such data set, split or column.
        MissingExtraError: `datasets` is not installed.
    """
    split = sources.split or hub.split
    if hub.video and not sources.images and not Path(sources.data).is_dir():
        raise ConfigError(f"the videos of {name} are no part of its rows: pass the folder that holds them (--images)")
    rows = _load(sources.data, hub, hub.config, split)
    if hub.video:
        videos = Videos.of(sources)
        plain = _listed(hub, sources, rows, split)
        listed = (replace(row, image=str(videos.find(row.text(hub.video), row.place))) for row in plain)
        return Rows(listed, sources.folder, videos, split, videos.title(name))
    pictures = _load(sources.data, hub, hub.images, split) if hub.images else rows
    for column in hub.columns:
        if column not in pictures.column_names:
            raise ConfigError(
                f"{sources.data} has no column {column!r}, only {', '.join(pictures.column_names)}; is it data of {name}?"
            )
    reader = _Rows(sources.data, pictures, hub.columns)
    return Rows(_with_images(hub, sources, rows, reader, split), sources.folder, reader, split)


def _listed(hub: Hub, sources: Sources, rows: Any, split: str) -> Iterator[Row]:
    for i, content in enumerate(rows):
        yield Row(content, f"{sources.data}, row {i}", hub.form, i, split=split, ocr=bool(sources.ocr))


def _with_images(hub: Hub, sources: Sources, rows: Any, reader: _Rows, split: str) -> Iterator[Row]:
    of_id = {number: i for i, number in enumerate(reader.rows["id"])} if hub.images else {}
    shared: dict[Any, int] = {}
    seen = _present(rows, hub.optional)
    texts = rows.remove_columns([c for c in hub.columns if c in rows.column_names])
    for i, row in enumerate(_listed(hub, sources, texts, split)):
        image: Any = i if hub.images or seen[i] else None
        if hub.images:
            image = of_id.get(row.get(hub.image_id))
            if image is None:
                raise ConfigError(f"{row.place}: no image has the id {shown(row.get(hub.image_id))} in {hub.images}")
        elif hub.same_image and row.get(hub.same_image) is not None:
            image = shared.setdefault(row.get(hub.same_image), i)
        size = dict(zip(("width", "height"), reader.read(image).size)) if hub.sizes else {}
        yield replace(row, content={**row.content, **size}, image=image)


class _Rows:
    """Images in the rows of a data set, by the number of the row."""

    def __init__(self, name: str, rows: Any, columns: Sequence[str] = ("image",)):
        self.name = name
        for column in columns:
            rows = rows.cast_column(column, _undecoded(rows.features[column]))
        self.rows = rows

    def _source(self, key: Any) -> Any:
        where = key if isinstance(key, Cell) else Cell(int(key), "image")
        cell = self.rows[where.row][where.column]
        if where.number is not None:
            cell = cell[where.number] if isinstance(cell, list) and where.number < len(cell) else None
        if not isinstance(cell, dict):
            return cell
        return cell["path"] if cell.get("bytes") is None else cell["bytes"]

    def read(self, key: Any) -> Any:
        if isinstance(key, tuple) and not isinstance(key, Cell):
            return [self.read(one) for one in key]
        row = key.row if isinstance(key, Cell) else key
        return open_picture(self._source(key), name=f"{self.name}, image of row {row}")

    def identify(self, key: Any) -> str:
        if isinstance(key, tuple) and not isinstance(key, Cell):
            return " ".join(self.identify(one) for one in key)
        return digest(self._source(key))


def _undecoded(feature: Any) -> Any:
    """The same feature whose images stay files."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    return type(feature)(_undecoded(feature.feature)) if hasattr(feature, "feature") else feature


def _present(rows: Any, optional: bool) -> list[bool]:
    """Of every row whether it has an image, without decoding any."""
    if not optional:
        return [True] * len(rows)
    import datasets

    return [row["image"] is not None for row in rows.select_columns("image").cast_column("image", datasets.Image(decode=False))]


def _load(data: str, hub: Hub, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets") from error
    folders = [
        folder for folder in (Path(data) / (config or ""), Path(data)) if any((folder / name).is_file() for name in _SAVED)
    ]
    files = [] if folders or not hub.video or not Path(data).is_dir() else find_files(Path(data), f"{split}*.parquet")
    try:
        if files:  # videos beside them would be taken for the data
            return datasets.load_dataset("parquet", data_files={split: [str(file) for file in files]}, split=split)
        if not folders:
            name = hub.path if data == HUB else data.removeprefix(f"{HUB}:")
            single = config is None or len(datasets.get_dataset_config_names(name)) == 1  # whatever it is called
            return datasets.load_dataset(name, None if single else config, split=split)
        found = datasets.load_from_disk(str(folders[0]))
    except Exception as error:  # the library raises what its readers and the network raise
        text = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"datasets cannot load {data} (configuration {config or 'default'}, split {split}): {type(error).__name__} {text}"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise ConfigError(f"{data} has no split {shown(split)}, only {', '.join(found)}; name one with --split")
    return found[split]

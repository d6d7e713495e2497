"""Rows of the `datasets` library instead of files: a folder that it saved, parquet files, or a name on the hub.

The names that lmms-eval 0.7 reads are the defaults, which every task states itself (most ask for a login to the hub).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vtok.errors import ConfigError, MissingExtraError, shown
from vtok.eval.common.pictures import digest, find_files, open_picture
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources import Sources
from vtok.eval.tasks.vqa.sources.files import checked
from vtok.eval.tasks.vqa_video.videos import Videos

HUB = "hub"
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder


class Cell(NamedTuple):
    """An image in a column that is not called "image", or in a list; several of them, as a tuple, are shown together.

    Attributes:
        row: its number.
        column: of the image.
        number: place in a list, `None` = the column holds one image.
    """

    row: int
    column: str
    number: int | None = None


class Hub(NamedTuple):
    """Where the rows of a task are, and what they mean.

    Attributes:
        path: of the data set on the hub.
        config: its configuration, `None` = the only one.
        split: that is asked.
        question: (row without its image, place for messages, key of its image or `None` without one, split) -> question, or
            as many of them as the row holds.
        prompt: text behind every question.
        images: configuration that holds the images apart, "" = they stand in the rows.
        image_id: column that names a row's image there, whose rows have an `id`.
        same_image: column that is equal for rows with the same image, "" = none is known.
        optional: whether a row may have no image.
        check: (questions, place) -> questions, what must hold for all of them together.
        columns: that hold images; the question is then given the number of its row, see `Cell`.
        sizes: whether a row is given the `width` and `height` of its image, in pixels.
        video: row -> name of its video, a file in the folder of the images; `None` = rows are about images.
    """

    path: str
    config: str | None
    split: str
    question: Callable[[Any, str, Any, str], Question | Sequence[Question]]
    prompt: str
    images: str = ""
    image_id: str = ""
    same_image: str = ""
    optional: bool = False
    check: Callable[[VQAData, str], VQAData] | None = None
    columns: tuple[str, ...] = ("image",)
    sizes: bool = False
    video: Callable[[Any], str] | None = None


def is_dataset(data: str) -> bool:
    """Whether data means the `datasets` library.

    Args:
        data: does so if it is "hub", "hub:NAME", a folder that the library saved, one of such folders (a configuration each),
            or one with parquet files.
    """
    folder = Path(data)
    if data == HUB or data.startswith(f"{HUB}:"):
        return True
    return folder.is_dir() and any(
        any(folder.glob(f"{depth}{name}")) for depth in ("", "*/") for name in (*_SAVED, "*.parquet")
    )


def read(name: str, hub: Hub, sources: Sources) -> VQAData:
    """Questions of a data set; images are decoded when they are asked about.

    Raises:
        ConfigError: no such data set, split or column, or a row that is not of the task's form.
        MissingExtraError: `datasets` is not installed.
    """
    split = sources.split or hub.split
    if hub.video is not None:
        return _about_videos(name, hub, sources, split)
    rows = _load(sources.data, hub, hub.config, split)
    pictures = _load(sources.data, hub, hub.images, split) if hub.images else rows
    for column in hub.columns:
        if column not in pictures.column_names:
            raise ConfigError(
                f"{sources.data} has no column {column!r}, only {', '.join(pictures.column_names)}; is it data of {name}?"
            )
    of_id = {number: i for i, number in enumerate(pictures["id"])} if hub.images else {}
    found: list[Question] = []
    shared: dict[Any, int] = {}
    seen, reader = _present(rows, hub.optional), _Rows(sources.data, pictures, hub.columns)
    for i, row in enumerate(rows.remove_columns([c for c in hub.columns if c in rows.column_names])):
        place = f"{sources.data}, row {i}"
        image: Any = i if hub.images or seen[i] else None
        if hub.images:
            image = of_id.get(row.get(hub.image_id))
            if image is None:
                raise ConfigError(f"{place}: no image has the id {shown(row.get(hub.image_id))} in {hub.images}")
        elif hub.same_image and row.get(hub.same_image) is not None:
            image = shared.setdefault(row[hub.same_image], i)
        more = dict(zip(("width", "height"), reader.read(image).size)) if hub.sizes else {}
        found += _listed(hub.question({**row, **more, "ocr": bool(sources.ocr)}, place, image, split))
    data = checked(name, found, Path(sources.data), reader, hub.prompt, split)
    return data if hub.check is None else hub.check(data, sources.data)


def _listed(made: Question | Sequence[Question]) -> Sequence[Question]:
    return [made] if isinstance(made, Question) else made


def _about_videos(name: str, hub: Hub, sources: Sources, split: str) -> VQAData:
    """Questions of rows that name a video, which is a file."""
    if not sources.images and not Path(sources.data).is_dir():
        raise ConfigError(f"the videos of {name} are no part of its rows: pass the folder that holds them (--images)")
    videos, found = Videos.of(sources), list[Question]()
    for i, row in enumerate(_load(sources.data, hub, hub.config, split)):
        place = f"{sources.data}, row {i}"
        video = str(videos.find(hub.video(row), place))  # type: ignore[misc]
        found += _listed(hub.question({**row, "ocr": bool(sources.ocr)}, place, video, split))
    data = videos.questions(name, found, Path(sources.data), hub.prompt, split)
    return data if hub.check is None else hub.check(data, sources.data)


class _Rows:
    """Images in the rows of a data set, by the number of the row."""

    def __init__(self, name: str, rows: Any, columns: Sequence[str] = ("image",)):
        self.name = name
        for column in columns:
            rows = rows.cast_column(column, _undecoded(rows.features[column]))
        self._rows = rows

    def _source(self, key: Any) -> Any:
        """Bytes or path of the picture, or what else the row holds."""
        where = key if isinstance(key, Cell) else Cell(int(key), "image")
        cell = self._rows[where.row][where.column]
        if where.number is not None:
            cell = cell[where.number] if isinstance(cell, list) and where.number < len(cell) else None
        if not isinstance(cell, dict):
            return cell
        return cell["path"] if cell.get("bytes") is None else cell["bytes"]

    def read(self, key: Any) -> Any:
        """A PIL image, or of several keys a list of them."""
        if isinstance(key, tuple) and not isinstance(key, Cell):
            return [self.read(one) for one in key]
        row = key.row if isinstance(key, Cell) else key
        return open_picture(self._source(key), name=f"{self.name}, image of row {row}")

    def identify(self, key: Any) -> str:
        """Hash of its content."""
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
    """The rows of a split."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets") from error
    folders = [
        folder for folder in (Path(data) / (config or ""), Path(data)) if any((folder / name).is_file() for name in _SAVED)
    ]
    files = [] if folders or hub.video is None or not Path(data).is_dir() else find_files(Path(data), f"{split}*.parquet")
    try:
        if files:  # videos beside them would be taken for the data
            return datasets.load_dataset("parquet", data_files={split: [str(file) for file in files]}, split=split)
        if not folders:
            name = hub.path if data == HUB else data.removeprefix(f"{HUB}:")
            return datasets.load_dataset(name, _known(datasets, name, config), split=split)
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


def _known(datasets: Any, name: str, config: str | None) -> str | None:
    """The configuration, or `None` for data that have a single one of another name."""
    return None if config is None or len(datasets.get_dataset_config_names(name)) == 1 else config

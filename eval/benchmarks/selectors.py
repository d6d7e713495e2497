"""What choosing costs, method by method, on one synthetic prompt of the size of LLaVA-1.5-7B or LLaVA-NeXT-7B.

Only the choice is run, with what it must work out again of a vision tower or of a decoder layer: features, weights and hidden
states are random tensors of the sizes of CLIP ViT-L/14 and of a Llama of 7B. What depends on the values (how many tokens leave
under a method that adapts) is not that of a real image; times, products and memory of methods with a fixed budget are.

What was measured: assets/docs/results/selectors.md in the repository.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vtok.capabilities import prompt_reducer
from vtok.config import MethodConfig
from vtok.core.prompt import Entry, ImageFeatures, LayerAttention, Layout, PromptText, View, VLMInfo, VLMReducer
from vtok.core.tokens import AttentionView, Place, Site
from vtok.core.tower import TowerBlock, TowerFacts
from vtok.cost.prefill import LayerCost
from vtok.errors import ConfigError, UnsupportedModelError, VtokError
from vtok.eval.benchmarks.throughput import seconds_of
from vtok.registry import METHODS

TEXT = 64  # tokens of text, half of them in front of the image
DEPTH, HEADS = 32, 32
WIDTH, INNER = 4096, 11008  # of a Llama of 7B
TOWER = TowerFacts(
    depth=24, has_cls=True, num_prefix=1, feature_block=22, width=1024, num_heads=16, head_dim=64, num_patches=576
)
_MIB = 2**20


class Chosen(NamedTuple):
    """What one method's choice costs.

    Attributes:
        method: its config.
        where: the sites at which it chooses; only the first is run.
        kept: visual tokens behind that site.
        seconds: median of one call.
        macs: multiply-accumulates of its matrix products, closed form.
        share: of those that the decoder layers of the unpatched LLM need to read the prompt.
        peak: bytes of the tensors that it holds at most, beside what it is given.
        refused: why it cannot choose here; everything else is empty then.
    """

    method: MethodConfig
    where: str = ""
    kept: float = 0.0
    seconds: float = 0.0
    macs: float = 0.0
    share: float = 0.0
    peak: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Synthetic:
    """One prompt of random numbers.

    Attributes:
        views: crops of the image, or frames of the video.
        side: rows and columns of a view's tokens.
        width: of a token in the LLM.
        video: whether the views are frames.
        seed: of the numbers.
        device: where they lie.
    """

    views: int = 5
    side: tuple[int, int] = (24, 24)
    width: int = WIDTH
    video: bool = False
    seed: int = 0
    device: str = "cpu"

    @classmethod
    def of(cls, tokens: int, views: int, width: int, video: bool = False, seed: int = 0, device: str = "cpu") -> Synthetic:
        """One of so many visual tokens, the same number in every view.

        Raises:
            ConfigError: they cannot be dealt out, or the width is no multiple of the heads.
        """
        if tokens % views:
            raise ConfigError(f"{tokens} tokens cannot be dealt out to {views} views alike; pass a multiple of the views")
        if width % HEADS:
            raise ConfigError(f"a width of {width} cannot be dealt out to {HEADS} heads; pass a multiple of {HEADS}")
        rows = next(r for r in range(math.isqrt(tokens // views), 0, -1) if tokens // views % r == 0)
        return cls(views, (rows, tokens // views // rows), width, video, seed, device)

    @property
    def tokens(self) -> int:
        """n, visual tokens of the prompt."""
        return self.views * math.prod(self.side)

    @property
    def modality(self) -> str:
        return "video" if self.video else "image"

    @property
    def layout(self) -> tuple[View, ...]:
        size = math.prod(self.side)
        return tuple(
            View(i * size, *self.side, overview=i == 0 and self.views > 1 and not self.video) for i in range(self.views)
        )

    def info(self) -> VLMInfo:
        """What a method may know of the model."""
        return VLMInfo(
            "a model of random numbers", DEPTH, self.width, HEADS,
            tower=replace(TOWER, num_patches=math.prod(self.side)), connector_macs=TOWER.width * self.width,
            videos=self.video, grid=self.side if self.views == 1 else None, crops=self.views > 1 and not self.video,
        )  # fmt: skip

    def random(self, *shape: int, number: int = 0) -> Tensor:
        """Numbers with a common part, so that cosines are positive, as those of real features."""
        generator = torch.Generator().manual_seed(self.seed + number)
        return (torch.randn(shape, generator=generator) + 0.5).to(self.device)

    def images(self, reducer: VLMReducer) -> ImageFeatures:
        """What a method is shown in front of the LLM."""
        text = torch.ones(1, TEXT // 2, dtype=torch.bool, device=self.device)
        weight = self.random(TOWER.width, self.width, number=1) / TOWER.width
        hidden = self.random(self.views, 1 + math.prod(self.side), TOWER.width, number=3)
        wide = self.random(TOWER.width, 3 * TOWER.width, number=4) / TOWER.width
        blocks = {number: _block(hidden, wide) for number in reducer.tower_blocks}
        return ImageFeatures(
            self.random(1, self.tokens, self.width),
            self.layout,
            self.modality,
            blocks,
            self.views if blocks else 0,
            text=PromptText(self.random(1, TEXT // 2, self.width, number=2), text) if reducer.reads_text else None,
            connector=lambda tokens: tokens.to(weight.dtype) @ weight,
        )

    def layer(self, layer: int) -> tuple[Tensor, Layout, LayerAttention]:
        """What a method is shown in front of a decoder layer."""
        length = self.tokens + TEXT
        visual = torch.zeros(1, length, dtype=torch.bool, device=self.device)
        visual[:, TEXT // 2 : TEXT // 2 + self.tokens] = True
        layout = Layout.whole(visual, torch.ones_like(visual))
        x = self.random(1, length, self.width, number=7)
        weights = [self.random(self.width, self.width, number=8 + i) / self.width for i in range(2)]
        order = torch.arange(length, device=self.device)

        def project(rows: Tensor | None) -> Tensor:
            taken = x if rows is None else x.gather(1, rows[..., None].expand(-1, -1, self.width))
            return (taken @ weights[rows is None]).unflatten(2, (HEADS, -1)).transpose(1, 2)

        def bias(rows: Tensor) -> Tensor:
            behind = order > rows[..., None]
            return x.new_zeros(behind.shape).masked_fill(behind, float("-inf"))[:, None]

        scale = (self.width // HEADS) ** -0.5
        return x, layout, LayerAttention(layer, scale, project, bias, final_norm=lambda t: t, entry=Entry(x, layout))


def _block(hidden: Tensor, weight: Tensor) -> TowerBlock:
    """A block of the tower that saw hidden [V, N, C]; like a real one it projects them when it is looked at."""

    def project() -> AttentionView:
        q, k, v = (hidden @ weight).unflatten(2, (3, TOWER.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return AttentionView(q, k, k, v, TOWER.head_dim**-0.5, None)

    return TowerBlock(1, None, project, lambda some: _block(hidden[list(some)], weight), leaves=lambda: hidden)


def _fresh(images: ImageFeatures) -> ImageFeatures:
    """The same, of which nothing has been looked at yet."""
    return images._replace(tower={number: replace(block) for number, block in images.tower.items()})


def prefill_macs(tokens: int, width: int = WIDTH) -> float:
    """Multiply-accumulates of the decoder layers of a Llama of 7B that reads so many tokens."""
    return DEPTH * LayerCost(4 * width * width + 3 * width * INNER, 2 * width, 2 * width).prefill(tokens)


class Held(TorchDispatchMode):
    """Bytes of the tensors that are made under it and still there (`now`), and how many they were at most (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self._known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given | self._known:
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return found

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def configs(share: float) -> list[MethodConfig]:
    """Every method that chooses visual tokens of a prompt, at one share of them where it takes one."""
    found = []
    for name in METHODS.names():
        kind: Any = METHODS.get(name)
        for params in ({"keep": share}, {}):
            try:
                found.append(kind(**params))
                break
            except (VtokError, TypeError):
                continue
    return found


def measure(
    methods: Sequence[MethodConfig], prompt: Synthetic, calls: int = 5, progress: Callable[[int, int], None] | None = None
) -> list[Chosen]:
    """Times the choice of every method, at the first site where it chooses; methods that reduce inside a tower alone are
    refused.

    Args:
        methods: configs.
        prompt: the numbers.
        calls: of which the median counts, after one that warms up.
        progress: called with methods done and methods in all.
    """
    found = []
    for i, config in enumerate(methods):
        try:
            result = _measured(config, prompt, calls)
        except (ConfigError, UnsupportedModelError, NotImplementedError) as error:
            result = Chosen(config, refused=str(error) or "it reduces tokens inside a vision tower alone")
        found.append(result)
        if progress is not None:
            progress(i + 1, len(methods))
    return found


def _measured(config: MethodConfig, prompt: Synthetic, calls: int) -> Chosen:
    reducer = prompt_reducer(config, prompt.info())
    if not reducer.sites:
        raise ConfigError("nothing leaves at this budget")
    site, n = reducer.sites[0], prompt.tokens
    call, macs, kept = _choice(reducer, prompt, site)
    with torch.inference_mode():
        with Held() as held:
            call()
        seconds = [seconds_of(call, torch.device(prompt.device)) for _ in range(calls)]
    return Chosen(
        config, ", ".join(str(one) for one in reducer.sites), kept, median(seconds), macs, macs / prefill_macs(n + TEXT),
        held.peak,
    )  # fmt: skip


def _choice(reducer: VLMReducer, prompt: Synthetic, site: Site) -> tuple[Callable[[], Any], float, float]:
    """(The call, its multiply-accumulates, tokens that stay)."""
    n, views, kind = prompt.tokens, prompt.layout, prompt.modality
    if site.place is Place.IMAGE_FEATURES:
        images = prompt.images(reducer)
        return (
            lambda: reducer.features(_fresh(images)),
            reducer.feature_macs(n, views, kind),
            reducer.feature_count(n, views, kind),
        )
    x, layout, attention = prompt.layer(reducer.probe(site))
    macs, kept = reducer.layer_macs(site, n, TEXT, n), reducer.layer_count(site, n, n)
    return lambda: reducer.keep(x, layout, replace(attention), site), macs, kept


def table(results: Sequence[Chosen], prompt: Synthetic) -> Table:
    """For people, the fastest first."""
    what = f"{prompt.views} x {math.prod(prompt.side)}" if prompt.views > 1 else str(prompt.tokens)
    shown = Table(
        title=f"choosing among {what} visual tokens of width {prompt.width} ({prompt.modality}), {prompt.device}, fp32",
        caption=f"stay: behind the first place; of prefill: MACs of the choice over those of a 7B Llama that reads "
        f"{prompt.tokens + TEXT} tokens; peak: tensors that the choice makes",
    )
    for column in ("method", "where", "stay", "ms", "GMACs", "of prefill", "peak MiB"):
        shown.add_column(column, justify="left" if column in ("method", "where") else "right")
    for r in sorted((r for r in results if not r.refused), key=lambda r: r.seconds):
        shown.add_row(
            str(r.method.name), r.where, f"{r.kept:.0f}", f"{1000 * r.seconds:.1f}", f"{r.macs / 1e9:.2f}", f"{r.share:.2%}",
            f"{r.peak / _MIB:.1f}",
        )  # fmt: skip
    return shown


def refusals(results: Sequence[Chosen]) -> list[str]:
    """One line a method that cannot choose here."""
    return [f"{r.method.name}: {r.refused}" for r in results if r.refused]

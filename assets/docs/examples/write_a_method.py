"""A method of your own in forty lines, and what it is worth on the bundled ViT beside random pruning at the same cost."""

from dataclasses import dataclass
from typing import ClassVar

from vtok.config import MethodConfig, Reducer, fraction
from vtok.core.reduction import Plan
from vtok.core.tokens import Place, Site
from vtok.ops.rows import with_prefix


@dataclass(frozen=True)
class Loudest(MethodConfig):
    """Every block keeps a share `keep` of its patches, those of largest norm."""

    name: ClassVar[str] = "loudest"
    keep: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        fraction(self.keep, "keep")  # a number in (0, 1], or an error that says so

    def build(self, info):
        return LoudestReducer(self.keep, info.depth)


@dataclass(frozen=True)
class LoudestReducer(Reducer):
    keep: float
    depth: int

    @property
    def sites(self):  # where it acts: between attention and MLP of every block
        return tuple(Site(Place.BLOCK_MID, i) for i in range(self.depth))

    def count(self, at, n, num_prefix):  # tokens that leave, for plans and budgets
        return num_prefix + int((n - num_prefix) * self.keep)

    def plan(self, x, state, view, at):  # x [B, N, D] -> rows that stay; vtok moves them and all that belongs to them
        p = state.num_prefix
        rows = x[:, p:].float().norm(dim=-1).topk(self.count(at, x.shape[1], p) - p).indices
        return Plan(with_prefix(rows.sort(-1).values, p))


if __name__ == "__main__":
    import vtok
    from vtok.eval.models.data import normalise
    from vtok.eval.models.reference import load_reference_images, load_reference_vit, top1

    model = load_reference_vit()
    images, labels = load_reference_images("test")
    images, labels = normalise(images[:500]), labels[:500]
    print(f"unpatched: top-1 {100 * top1(model, images, labels):.1f} %")
    for method in (Loudest(keep=0.9), vtok.RandomDrop(keep=0.9)):
        vtok.patch(model, method)
        print(f"{method.name}, keep=0.9: top-1 {100 * top1(model, images, labels):.1f} %")
    print(vtok.plan(model, Loudest(keep=0.9)))
